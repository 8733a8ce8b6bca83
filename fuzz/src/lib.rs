//! Fuzzing of everything that reads bytes from outside: the wire, the disks, files, arguments (I19).
//!
//! A [`Target`] is a function over bytes, in one small file below `targets/`. The [`engine`] mutates the target's
//! corpus and asserts that nothing panics, loops, or allocates beyond the target's bound. Which inputs are kept is
//! guided by coverage when the build is instrumented ([`coverage`], `cargo xtask fuzz --coverage`); without, the same
//! loop runs blind, reproducibly from a printed seed. Problem, list and figures: `docs/design/fuzzing.md`.

pub mod alloc;
pub mod corpus;
pub mod coverage;
mod driver;
pub mod engine;
mod mutate;
mod samples;
mod script;
mod targets;

pub use targets::TARGETS;

/// What the bytes of a target are, so that mutations can keep their outer form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Just bytes.
    Bytes,
    /// A list of pieces, each with a kind and a length: frames in some order, patches of a disk (see `script.rs`).
    Script,
    /// Text: names, numbers and separators.
    Text,
}

/// How much memory an input may cost while it is read: `max(base, factor × length)` bytes at any moment.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Always allowed.
    pub base: usize,
    /// Allowed for each byte of input.
    pub factor: usize,
    /// Why it is not the bound of I19; empty where it is.
    pub why: &'static str,
}

impl Bound {
    /// I19: 64 KiB, or four times the input.
    pub const STRICT: Bound = Bound { base: 64 << 10, factor: 4, why: "" };
}

/// Named inputs made by the real encoders.
pub type Seeds = Vec<(String, Vec<u8>)>;

/// One thing that reads bytes from outside.
pub struct Target {
    /// Its name, and that of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// What it covers, for the table.
    pub covers: &'static str,
    /// The function of the product that the bytes go to.
    pub entry: &'static str,
    /// What the bytes are.
    pub shape: Shape,
    /// What they may cost.
    pub bound: Bound,
    /// Reads them; panics where the product would, or where it broke a promise.
    pub run: fn(&[u8]),
    /// Makes checksums good after a mutation, so that it is not them that refuse it.
    pub seal: fn(&mut Vec<u8>),
    /// Inputs made by the real encoders: the start of the corpus.
    pub seeds: fn() -> Seeds,
}

/// For targets without checksums.
fn unsealed(_: &mut Vec<u8>) {}

/// Names a seed.
fn seed(name: &str, bytes: Vec<u8>) -> (String, Vec<u8>) {
    (name.to_owned(), bytes)
}

/// The table of `docs/design/fuzzing.md`: a test compares the page with it.
pub fn table() -> String {
    let mut out = String::from("| target | covers | entry | memory |\n|---|---|---|---|\n");
    for target in TARGETS {
        let Bound { base, factor, why } = target.bound;
        let memory = match why {
            "" => "I19".to_owned(),
            why => format!("max({} KiB, {factor} × input): {why}", base >> 10),
        };
        out.push_str(&format!("| `{}` | {} | `{}` | {memory} |\n", target.name, target.covers, target.entry));
    }
    out
}
