"""What ranks do together: agree, and name the one that does not answer."""
