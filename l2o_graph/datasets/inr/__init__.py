"""Datasets of implicit neural representations (INRs): SIRENs that represent one image each."""
