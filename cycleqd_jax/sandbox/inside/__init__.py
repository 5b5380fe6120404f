"""The part that runs behind the wall: standard library only, never imported by the parent."""
