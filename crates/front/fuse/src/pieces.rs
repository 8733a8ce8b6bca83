//! One buffer out of several.

use cairn_env::{Buf, BufMut};

/// The pieces in one buffer; a single piece is not copied.
pub(crate) fn join(mut pieces: Vec<Buf>) -> Buf {
    if pieces.len() == 1 {
        return pieces.remove(0);
    }
    let mut joined = BufMut::recycled(pieces.iter().map(|piece| piece.len()).sum());
    let mut filled = 0;
    for piece in pieces {
        joined[filled..filled + piece.len()].copy_from_slice(&piece);
        filled += piece.len();
    }
    joined.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_order() {
        let pieces = vec![Buf::copy_from(b"ab"), Buf::copy_from(b""), Buf::copy_from(b"cde")];
        assert_eq!(&*join(pieces), b"abcde");
        assert!(join(Vec::new()).is_empty());
    }
}
