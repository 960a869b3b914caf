"""What a backbone was made with, and the heads that classify what it puts out."""
