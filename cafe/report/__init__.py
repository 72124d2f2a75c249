"""Reports: tables, charts, figures and pages."""
