"""What every method has to be compared with: each half of the idea alone, and the tower without either."""
