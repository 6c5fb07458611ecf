"""What a run was and came to, as one HTML page and PNGs. Loads matplotlib: import it where a report is wanted."""

from kdjax.reporting.page import write_report
from kdjax.reporting.record import RunRecord

__all__ = ["RunRecord", "write_report"]
