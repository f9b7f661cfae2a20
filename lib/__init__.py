"""What the stages share and a first reader can skip: see the first lines of each file."""
