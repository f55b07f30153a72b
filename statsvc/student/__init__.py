"""The training side: cached, normalized targets in a student's training loop. Needs statsvc[student], with torch."""
