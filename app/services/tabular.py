"""Texts in CSV that no spreadsheet takes for formulas.

A cell that begins with one of `=`, `+`, `-`, `@`, a tab or a line end is run as a formula by spreadsheets, whatever its
quotes (OWASP, CSV Injection). Such a text gets an apostrophe in front, and so does one that begins with an
apostrophe: whoever reads the CSV takes one leading apostrophe away, and has the text as it was.
"""

_RISKY = (
    "=+-@\t\r\n'\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)


def safe(value: str) -> str:
    return f"'{value}" if value.startswith(tuple(_RISKY)) else value


def original(value: str) -> str:
    """What `safe` was given."""
    return value.removeprefix("'")


def safe_sql(column: str) -> str:
    """`safe` as an expression of PostgreSQL, for a column; null stays null."""
    risky = "".join(f"\\u{ord(char):04x}" for char in _RISKY)
    risk = f"{column} <> '' AND strpos(E'{risky}', left({column}, 1)) > 0"
    return f"CASE WHEN {risk} THEN '''' || {column} ELSE {column} END"
