"""Chess games as text: their alphabet, PGN files, and games that Stockfish plays.

Rules and the engine's protocol come from the package `chess` (the extra `[chess]`), which is imported only where it is
needed: reading PGN files takes neither it nor Stockfish.
"""
