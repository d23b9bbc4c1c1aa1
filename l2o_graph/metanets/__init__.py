"""Models that read the weights of networks: what do they draw, how accurate are they?"""
