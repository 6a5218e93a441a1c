"""From plain records to tables, figures and documents."""
