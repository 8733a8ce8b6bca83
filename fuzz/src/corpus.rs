//! The corpora: `fuzz/corpus/TARGET/`, one input a file. `seed-…` was made by the real encoders, `found-…` reached new
//! code, `regress-…` once broke something and stays for ever.

use crate::Target;
use cairn_stdx::checksum::crc64;
use std::io;
use std::path::{Path, PathBuf};

/// Where the corpora stand.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The folder of a target.
pub fn folder(target: &Target) -> PathBuf {
    root().join(target.name)
}

/// All inputs of a target by file name, in order.
///
/// # Errors
/// When the folder cannot be read; none at all is an empty corpus.
pub fn load(target: &Target) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut inputs = Vec::new();
    let entries = match std::fs::read_dir(folder(target)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(inputs),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        inputs.push((name, std::fs::read(&path)?));
    }
    inputs.sort();
    Ok(inputs)
}

/// Writes an input under `PREFIX-HASH`; gives its path.
///
/// # Errors
/// When it cannot be written.
pub fn save(folder: &Path, prefix: &str, bytes: &[u8]) -> io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    let path = folder.join(format!("{prefix}-{:016x}", crc64(bytes)));
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// Writes the inputs that the real encoders make, in place of those of earlier encoders. Gives their number.
///
/// # Errors
/// When one cannot be written.
pub fn write_seeds(target: &Target) -> io::Result<usize> {
    let folder = folder(target);
    std::fs::create_dir_all(&folder)?;
    for (name, _) in load(target)?.iter().filter(|(name, _)| name.starts_with("seed-")) {
        std::fs::remove_file(folder.join(name))?;
    }
    let seeds = (target.seeds)();
    for (name, bytes) in &seeds {
        std::fs::write(folder.join(format!("seed-{name}")), bytes)?;
    }
    Ok(seeds.len())
}
