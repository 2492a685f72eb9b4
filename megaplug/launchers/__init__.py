"""How a run starts: the local supervisor, what the machine has, what a person sees. No torch in here."""
