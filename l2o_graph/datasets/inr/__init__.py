"""Images as networks: SIRENs that each draw one image, fitted, stored, read and drawn again."""
