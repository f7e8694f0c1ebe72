"""The results of an output folder as a page to look at and as Markdown."""

from sae_lens_sampled.saebench.report.page import write_report

__all__ = ["write_report"]
