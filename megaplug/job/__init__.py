"""What is to be run: schema, checks, freezing, translation to Megatron arguments. No torch."""
