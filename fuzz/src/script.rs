//! Scripts: inputs that are a list of pieces. A piece is a kind, a length (u16, little-endian), bytes.
//!
//! Any bytes are a script: what does not fit at the end is cut.

/// Most pieces of a script that are looked at: bounds the time of one execution.
pub const PIECES_MAX: usize = 48;
const HEAD: usize = 3;

/// The pieces of a script.
pub fn pieces(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut pieces = Vec::new();
    while let [kind, low, high, rest @ ..] = bytes
        && pieces.len() < PIECES_MAX
    {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (piece, rest) = rest.split_at(len);
        pieces.push((*kind, piece));
        bytes = rest;
    }
    pieces
}

/// Appends a piece.
pub fn put(out: &mut Vec<u8>, kind: u8, piece: &[u8]) {
    let piece = &piece[..piece.len().min(usize::from(u16::MAX))];
    out.push(kind);
    out.extend_from_slice(&(piece.len() as u16).to_le_bytes());
    out.extend_from_slice(piece);
}

/// A whole script.
pub fn script<'a>(pieces: impl IntoIterator<Item = (u8, &'a [u8])>) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD);
    pieces.into_iter().for_each(|(kind, piece)| put(&mut out, kind, piece));
    out
}

/// All pieces, however many: for makers of seeds.
pub fn all(bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let (mut found, mut rest) = (Vec::new(), bytes);
    loop {
        let some = pieces(rest);
        let used: usize = some.iter().map(|(_, piece)| HEAD + piece.len()).sum();
        if used == 0 {
            return found;
        }
        found.extend(some);
        rest = &rest[used..];
    }
}
