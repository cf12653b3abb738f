"""The model and its mathematics: knows no Ray and no storage."""
