"""What a Vision Transformer is: its description, its weights, its forward in terms of ops, and whose files hold one."""
