"""What a compiled program costs on a chip: memory, arithmetic, traffic, and the roofline."""
