"""Tasks that people really have and that no meta-training family has, and who does them best."""
