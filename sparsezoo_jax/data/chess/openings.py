"""The opening book: well-known lines in standard algebraic notation, moves of both sides in turn."""

OPENINGS = (
    "e4 e5 Nf3 Nc6 Bb5 a6 Ba4 Nf6",  # Ruy Lopez
    "e4 e5 Nf3 Nc6 Bb5 Nf6 O-O Nxe4",  # Berlin Defence
    "e4 e5 Nf3 Nc6 Bc4 Bc5 c3 Nf6",  # Italian Game
    "e4 e5 Nf3 Nc6 Bc4 Bc5 b4 Bxb4",  # Evans Gambit
    "e4 e5 Nf3 Nc6 Bc4 Nf6 Ng5 d5",  # Two Knights Defence
    "e4 e5 Nf3 Nc6 d4 exd4 Nxd4 Nf6",  # Scotch Game
    "e4 e5 Nf3 Nc6 Nc3 Nf6",  # Four Knights Game
    "e4 e5 Nf3 Nf6 Nxe5 d6",  # Petrov's Defence
    "e4 e5 Nf3 d6 d4 exd4",  # Philidor Defence
    "e4 e5 f4 exf4 Nf3 g5",  # King's Gambit accepted
    "e4 e5 f4 Bc5 Nf3 d6",  # King's Gambit declined
    "e4 e5 Nc3 Nf6 f4 d5",  # Vienna Game
    "e4 e5 d4 exd4 Qxd4 Nc6",  # Centre Game
    "e4 e5 d4 exd4 c3 dxc3",  # Danish Gambit
    "e4 e5 Bc4 Nf6 d3 c6",  # Bishop's Opening
    "e4 c5 Nf3 d6 d4 cxd4 Nxd4 Nf6 Nc3 a6",  # Sicilian, Najdorf
    "e4 c5 Nf3 d6 d4 cxd4 Nxd4 Nf6 Nc3 g6",  # Sicilian, Dragon
    "e4 c5 Nf3 Nc6 d4 cxd4 Nxd4 Nf6 Nc3 e5",  # Sicilian, Sveshnikov
    "e4 c5 Nf3 e6 d4 cxd4 Nxd4 Nc6",  # Sicilian, Taimanov
    "e4 c5 c3 d5 exd5 Qxd5",  # Sicilian, Alapin
    "e4 c5 d4 cxd4 c3 dxc3",  # Smith-Morra Gambit
    "e4 c5 Nc3 Nc6 g3 g6",  # Sicilian, closed
    "e4 e6 d4 d5 Nc3 Bb4",  # French, Winawer
    "e4 e6 d4 d5 e5 c5 c3 Nc6",  # French, advance
    "e4 e6 d4 d5 exd5 exd5",  # French, exchange
    "e4 c6 d4 d5 Nc3 dxe4 Nxe4 Bf5",  # Caro-Kann, classical
    "e4 c6 d4 d5 e5 Bf5",  # Caro-Kann, advance
    "e4 d5 exd5 Qxd5 Nc3 Qa5",  # Scandinavian Defence
    "e4 Nf6 e5 Nd5 d4 d6",  # Alekhine's Defence
    "e4 d6 d4 Nf6 Nc3 g6",  # Pirc Defence
    "e4 g6 d4 Bg7 Nc3 d6",  # Modern Defence
    "e4 b6 d4 Bb7 Bd3 e6",  # Owen's Defence
    "e4 Nc6 d4 d5 Nc3 dxe4",  # Nimzowitsch Defence
    "d4 d5 c4 e6 Nc3 Nf6 Bg5 Be7",  # Queen's Gambit declined
    "d4 d5 c4 dxc4 Nf3 Nf6 e3 e6",  # Queen's Gambit accepted
    "d4 d5 c4 c6 Nf3 Nf6 Nc3 dxc4",  # Slav Defence
    "d4 d5 c4 e5 dxe5 d4",  # Albin Countergambit
    "d4 d5 Bf4 Nf6 e3 c5",  # London System
    "d4 d5 e3 Nf6 Bd3 c5 c3 Nc6",  # Colle System
    "d4 Nf6 c4 e6 Nc3 Bb4 e3 O-O",  # Nimzo-Indian Defence
    "d4 Nf6 c4 e6 Nf3 b6 g3 Bb7",  # Queen's Indian Defence
    "d4 Nf6 c4 e6 g3 d5 Bg2 Be7",  # Catalan Opening
    "d4 Nf6 c4 g6 Nc3 Bg7 e4 d6",  # King's Indian Defence
    "d4 Nf6 c4 g6 Nc3 d5 cxd5 Nxd5",  # Gruenfeld Defence
    "d4 Nf6 c4 c5 d5 e6 Nc3 exd5",  # Modern Benoni
    "d4 Nf6 c4 c5 d5 b5 cxb5 a6",  # Benko Gambit
    "d4 Nf6 c4 e5 dxe5 Ng4",  # Budapest Gambit
    "d4 Nf6 Bg5 Ne4 Bf4 d5",  # Trompowsky Attack
    "d4 f5 g3 Nf6 Bg2 g6",  # Dutch, Leningrad
    "d4 f5 c4 Nf6 Nc3 e6",  # Dutch Defence
    "d4 e6 c4 b6 e4 Bb7",  # English Defence
    "c4 e5 Nc3 Nf6 Nf3 Nc6",  # English Opening
    "c4 c5 Nf3 Nf6 d4 cxd4",  # English, symmetrical
    "c4 Nf6 Nc3 e6 e4 d5",  # English, Mikenas
    "Nf3 d5 g3 Nf6 Bg2 c6 O-O Bg4",  # King's Indian Attack
    "Nf3 d5 c4 d4 b4 f6",  # Reti Opening
    "b3 e5 Bb2 Nc6 e3 Nf6",  # Larsen's Opening
    "f4 d5 Nf3 g6 e3 Bg7",  # Bird's Opening
    "b4 e5 Bb2 Bxb4 Bxe5 Nf6",  # Polish Opening
    "g3 d5 Bg2 e5 d3 Nf6",  # Hungarian Opening
    "Nc3 d5 e4 d4 Nce2 e5",  # Van Geet Opening
)
