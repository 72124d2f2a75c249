"""Reports: tables, charts, figures and pages."""

MISTAKES = 24  # faces that a gallery of mistakes shows
