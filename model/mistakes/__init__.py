"""Wrong verdicts that a person has found, kept in a folder of this machine, and measured again."""
