"""What tests share: networks, slow twins, symmetries, programs that are stopped."""
