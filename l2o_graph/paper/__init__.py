"""The learned optimizer of Kofinas et al. 2024: features, readers, rule and step."""
