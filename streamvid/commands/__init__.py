"""The commands, one module each: `add(commands)` declares its options and what runs it."""
