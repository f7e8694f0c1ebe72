"""The report on an output folder's results, as an HTML page and as Markdown."""

from sae_lens_sampled.saebench.report.page import write_report

__all__ = ["write_report"]
