"""The part that runs behind the wall: standard library only; the parent shares just `wire`."""
