"""What each `potstill` command does with its options: parse, call a room, print."""
