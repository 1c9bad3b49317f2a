"""How figures and states read to a person."""

from datetime import UTC, datetime

STATES = {
    "queued": "Waiting",
    "running": "Running",
    "succeeded": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
STAGES = {
    "features": "Looking at every image",
    "auto": "Finding the number of clusters",
    "heads": "Finding the clusters to teach",
    "pixels": "Decoding every image",
    "training": "Learning the clusters",
    "encoding": "Looking again with what was learned",
    "answer": "Finding the clusters in it",
    "baseline": "Comparing with plain k-means",
    "representatives": "Choosing representative images",
}
METHODS = {
    "scl": "SCL",
    "kmeans": "k-means",
    "kmeans_pixels": "k-means on pixels",
    "temi": "TEMI",
    "scan": "SCAN",
    "simclr": "SimCLR + k-means",
    "cc": "Contrastive Clustering",
    "pica": "PICA",
}
TRAIN = {"head": "Head only", "finetune": "Head, then network", "full": "Whole network"}
TRAINED = {"finetune": ", then the network", "full": ", whole network"}  # after the method's name
# What speaks for a number of clusters.
CRITERIA = {
    "eigengap": "How far groups of neighbours lie apart",
    "reproduced": "How alike are the groups of two halves",
    "height": "How unlike are groups that would merge",
}


OUTCOMES = {"accepted": "Accepted", "duplicate": "Duplicate", "rejected": "Rejected"}

# By the least adjusted Rand index that they hold for.
_AGREEMENTS = (
    (0.95, "are almost the same"),
    (0.8, "agree closely"),
    (0.6, "agree for the most part"),
    (0.3, "agree in part"),
)
_DISAGREEMENT = "differ widely"

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def stage(name: str | None) -> str:
    return STAGES.get(name or "", "Getting ready")


def count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float) -> str:
    """Never rounded to a claim of all or nothing that does not hold."""
    if 0.995 <= share < 1:
        return ">99%"
    if 0 < share < 0.005:
        return "<1%"
    return f"{share:.0%}"


def agreement(index: float) -> str:
    """What an adjusted Rand index between groupings says: 1 is the same grouping, 0 what chance gives."""
    return next((words for least, words in _AGREEMENTS if index >= least), _DISAGREEMENT)


def clarity(share: float) -> str:
    """How far the number of clusters can be relied on."""
    if share >= 0.75:
        return "The groups lie clearly apart"
    return "The groups lie apart, but not all of them" if share > 0 else "No number stands out: take this as a proposal"


def why_not(reason: str) -> str:
    """Why a number of clusters was not taken, with what was measured in words."""
    for name, words in CRITERIA.items():
        reason = reason.replace(name, f"“{words}”")
    return reason.replace("named by no witness", "none of the three says so").replace("named by", "said by")


def vote(number: float) -> str:
    """A mean of whole numbers, rounded to none of them."""
    return f"{number:.1f}".removesuffix(".0")


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def time_left(seconds: float) -> str:
    """Estimates change with every look: a coarse one is calmer, and no less true."""
    if seconds < 5:
        return "a few seconds left"
    if seconds < _MINUTE:
        return f"about {max(5, round(seconds / 5) * 5)} s left"
    if seconds < _HOUR:
        return f"about {round(seconds / _MINUTE)} min left"
    return f"about {seconds / _HOUR:.1f} h left"


def ago(moment: datetime, now: datetime | None = None) -> str:
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < 45:
        return "just now"
    if seconds < _HOUR:
        return f"{max(1, round(seconds / _MINUTE))} min ago"
    if seconds < _DAY:
        return f"{round(seconds / _HOUR)} h ago"
    return f"{moment.astimezone(UTC):%-d %b %Y}"


def moment(value: datetime) -> str:
    return f"{value.astimezone(UTC):%-d %b %Y, %H:%M} UTC"


def filesize(number: int) -> str:
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
