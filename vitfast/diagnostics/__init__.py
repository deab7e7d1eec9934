"""What runs here and why, whether it is right, what the compiler made of it, and how long it should take."""
