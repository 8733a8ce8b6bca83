//! Mutations: blind ones of bytes, of numbers and lengths, and such that keep the outer form of a script or a text.

use crate::script;
use crate::{Shape, Target};
use cairn_stdx::Rng;

/// Longest input made by mutation.
const LEN_MAX: usize = 16 << 10;

const NUMBERS: [u64; 24] = [
    0,
    1,
    2,
    7,
    8,
    63,
    64,
    127,
    128,
    255,
    256,
    4095,
    4096,
    16_384,
    32_767,
    65_535,
    65_536,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    (1 << 62) - 1,
    i64::MAX as u64,
    u64::MAX,
];

const WORDS: [&str; 28] = [
    "=",
    ":",
    ",",
    "#",
    "\n",
    " ",
    "[",
    "]",
    "::1",
    "0",
    "1",
    "-1",
    "18446744073709551615",
    "99999999999999999999",
    "1e400",
    "nan",
    "inf",
    "1.5G",
    "\u{e4}",
    "\u{1F600}",
    "\0",
    "--",
    "-o",
    "-",
    "/",
    "..",
    "{}",
    "\"",
];

/// Changes `bytes` in `rounds` places; `other` lends pieces for splices, `compared` operands that would have been
/// equal.
pub fn mutate(target: &Target, bytes: &mut Vec<u8>, other: &[u8], compared: &[(u64, u64)], rounds: u32, rng: &mut Rng) {
    for _ in 0..rounds {
        match target.shape {
            Shape::Script if rng.chance(9, 10) => script_step(bytes, other, compared, rng),
            Shape::Text if rng.chance(1, 2) => text_step(bytes, rng),
            _ => bytes_step(bytes, other, compared, rng),
        }
    }
    bytes.truncate(LEN_MAX);
}

fn place(len: usize, rng: &mut Rng) -> usize {
    // Lengths, kinds and counts stand at the front.
    if rng.chance(1, 3) { rng.below(len.min(16) as u64 + 1) as usize } else { rng.below(len as u64 + 1) as usize }
}

fn number(len: usize, rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => *rng.choose(&NUMBERS).expect("not empty"),
        1 => (len as u64).wrapping_add(rng.below(5)).wrapping_sub(2),
        2 => 1u64 << rng.below(64),
        _ => rng.next_u64() >> rng.below(64),
    }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 128 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn bytes_step(bytes: &mut Vec<u8>, other: &[u8], compared: &[(u64, u64)], rng: &mut Rng) {
    let len = bytes.len();
    let at = place(len, rng);
    let left = len - at;
    match rng.below(16) {
        0 | 1 if left > 0 => bytes[at] ^= 1 << rng.below(8),
        2 if left > 0 => bytes[at] = rng.next_u64() as u8,
        3 if left > 0 => bytes[at] = bytes[at].wrapping_add(if rng.chance(1, 2) { 1 } else { 255 }),
        // A number of 2, 4 or 8 bytes, either end first; often a length.
        4..=6 => {
            let width = *rng.choose(&[2usize, 4, 8]).expect("not empty");
            if left >= width {
                let field = &mut bytes[at..at + width];
                let value = if rng.chance(1, 2) {
                    number(left - width, rng)
                } else {
                    let mut old = [0; 8];
                    old[..width].copy_from_slice(field);
                    u64::from_le_bytes(old).wrapping_add(rng.below(17)).wrapping_sub(8)
                };
                if rng.chance(1, 4) {
                    field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
                } else {
                    field.copy_from_slice(&value.to_le_bytes()[..width]);
                }
            }
        }
        // The variable-length numbers of control messages.
        7 => {
            let value = varint(number(left, rng));
            let old = bytes[at..].iter().take_while(|byte| **byte >= 128).count() + 1;
            let end = (at + old).min(len);
            bytes.splice(at..end, value);
        }
        8 => bytes.truncate(at),
        9 => {
            let count = rng.below(16).min(left as u64) as usize;
            bytes.drain(at..at + count);
        }
        10 => {
            let count = 1 + rng.below(8) as usize;
            let fresh: Vec<u8> = (0..count).map(|_| rng.next_u64() as u8).collect();
            bytes.splice(at..at, fresh);
        }
        // Again what stands here: lists grow, messages come twice.
        11 if left > 0 => {
            let count = 1 + rng.below(left.min(64) as u64) as usize;
            let most = 1 << rng.below(8);
            let times = 1 + rng.below(most) as usize;
            let again = bytes[at..at + count].repeat(times);
            bytes.splice(at..at, again);
        }
        12 if !other.is_empty() => {
            let from = rng.below(other.len() as u64) as usize;
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        13 if !other.is_empty() => {
            let from = rng.below(other.len() as u64) as usize;
            let count = 1 + rng.below((other.len() - from).min(64) as u64) as usize;
            let end = (at + count).min(len);
            bytes.splice(at..end, other[from..from + count].iter().copied());
        }
        14 | 15 => fit_compared(bytes, compared, rng),
        _ => {}
    }
}

/// Where one operand of a comparison stands in the bytes, writes the other.
fn fit_compared(bytes: &mut [u8], compared: &[(u64, u64)], rng: &mut Rng) {
    let Some(&(mut found, mut wanted)) = rng.choose(compared) else { return };
    if rng.chance(1, 2) {
        std::mem::swap(&mut found, &mut wanted);
    }
    for width in [8usize, 4, 2] {
        if width < 8 && (found | wanted) >> (8 * width) != 0 {
            continue;
        }
        let (little, big) = (found.to_le_bytes(), found.to_be_bytes());
        let places: Vec<(usize, bool)> = bytes
            .windows(width)
            .enumerate()
            .flat_map(|(at, window)| {
                let (is_little, is_big) = (window == &little[..width], window == &big[8 - width..]);
                [is_little.then_some((at, false)), is_big.then_some((at, true))].into_iter().flatten()
            })
            .take(64)
            .collect();
        if let Some((at, big)) = rng.choose(&places) {
            let value = wanted.wrapping_add(rng.below(3)).wrapping_sub(1);
            let field = &mut bytes[*at..at + width];
            match big {
                true => field.copy_from_slice(&value.to_be_bytes()[8 - width..]),
                false => field.copy_from_slice(&value.to_le_bytes()[..width]),
            }
            return;
        }
    }
}

fn script_step(bytes: &mut Vec<u8>, other: &[u8], compared: &[(u64, u64)], rng: &mut Rng) {
    let mut pieces: Vec<(u8, Vec<u8>)> =
        script::pieces(bytes).into_iter().map(|(kind, piece)| (kind, piece.to_vec())).collect();
    let at = rng.below(pieces.len() as u64 + 1) as usize;
    let lent = script::pieces(other);
    match rng.below(10) {
        0..=4 if at < pieces.len() => {
            let from: Vec<u8> = rng.choose(&lent).map(|(_, piece)| piece.to_vec()).unwrap_or_default();
            for _ in 0..1 + rng.below(2) {
                bytes_step(&mut pieces[at].1, &from, compared, rng);
            }
        }
        5 if at < pieces.len() => drop(pieces.remove(at)),
        6 if at < pieces.len() => pieces.insert(at, pieces[at].clone()),
        7 if at < pieces.len() => {
            let with = rng.below(pieces.len() as u64) as usize;
            pieces.swap(at, with);
        }
        8 if at < pieces.len() => pieces[at].0 = rng.below(16) as u8 | (rng.below(16) as u8) << 4,
        _ => {
            if let Some((kind, piece)) = rng.choose(&lent) {
                pieces.insert(at, (*kind, piece.to_vec()));
            }
        }
    }
    *bytes = script::script(pieces.iter().map(|(kind, piece)| (*kind, &piece[..])));
}

fn text_step(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = place(bytes.len(), rng);
    if rng.chance(1, 2) {
        let word = rng.choose(&WORDS).expect("not empty");
        bytes.splice(at..at, word.bytes());
        return;
    }
    // A run of digits becomes another number.
    let end = at + bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let value = number(bytes.len(), rng).to_string();
    bytes.splice(at..end, value.into_bytes());
}
