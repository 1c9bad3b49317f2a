"""The description of the API as a page."""

import html
import re

from fastapi.testclient import TestClient


def test_the_page_of_the_api_tells_kinds_limits_and_defaults(api: TestClient):
    page = api.get("/docs").text
    one_shot = page[page.index("/v1/cluster</code>") :].partition("</details>")[0]
    rows = {
        cells[0]: [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in cells[2:4]]
        for row in re.findall(r"<tr><th.*?</tr>", one_shot, re.DOTALL)
        if (cells := [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)])
    }
    assert rows["file"] == ["binary, one or more", ""]
    assert rows["clusters"] == ["integer, 2 to 4,096 or auto", ""]
    assert rows["image_size"] == ["integer, 32 to 1,024", "224"]
    assert rows["epochs"] == ["integer, 1 to 10,000", ""]
    assert rows["backbone"] == ["string, up to 100 characters", "efficientnet_lite0"]
    assert rows["method"][1] == "scl"
