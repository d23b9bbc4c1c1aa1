"""The learned optimizer of Kofinas et al. 2024 itself: features, readers, rule and step."""
