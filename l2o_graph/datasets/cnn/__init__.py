"""CNNs as data: trained in numbers, and stored with their accuracy."""
