//! Trees of files: made from a seed, compared by content.

use cairn_stdx::Rng;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Makes `file_count` files of 0 to 16 KiB in directories of about fifty, with a symbolic link and an odd name in each.
pub fn make(root: &Path, file_count: u64, seed: u64) -> io::Result<()> {
    let mut rng = Rng::new(seed);
    for index in 0..file_count {
        let dir = root.join(format!("d{:03}/é {}", index / 500, (index / 50) % 10));
        if index % 50 == 0 {
            fs::create_dir_all(&dir)?;
            std::os::unix::fs::symlink("file-0", dir.join("link"))?;
        }
        let mut bytes = vec![0; rng.below(16 << 10) as usize];
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes()[..word.len()]);
        }
        fs::write(dir.join(format!("file-{}", index % 50)), bytes)?;
    }
    Ok(())
}

/// Every path below `root` with kind, permissions and a checksum of what it holds.
pub fn digest(root: &Path) -> io::Result<BTreeMap<PathBuf, String>> {
    use std::os::unix::fs::PermissionsExt;
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            let mode = metadata.permissions().mode();
            let content = if metadata.is_symlink() {
                fs::read_link(&path)?.display().to_string()
            } else if metadata.is_dir() {
                todo.push(path.clone());
                "directory".to_owned()
            } else {
                format!("{} bytes {:032x}", metadata.len(), checksum(&fs::read(&path)?))
            };
            found.insert(path.strip_prefix(root).expect("it lies below").to_path_buf(), format!("{mode:o} {content}"));
        }
    }
    Ok(found)
}

/// Checks that two trees are alike; gives the number of entries.
pub fn compare(wanted: &Path, found: &Path) -> usize {
    let wanted_digest = digest(wanted).expect("read the source tree");
    let found_digest = digest(found).expect("read the copied tree");
    for (path, content) in &wanted_digest {
        let other = found_digest.get(path).map_or("missing", String::as_str);
        assert_eq!(other, content, "{}", path.display());
    }
    assert_eq!(found_digest.len(), wanted_digest.len(), "nothing more than was copied");
    wanted_digest.len()
}

/// 128 bits over all bytes, enough to tell damaged from whole: two multiply-and-rotate lanes.
pub fn checksum(bytes: &[u8]) -> u128 {
    let mut lanes = [0x243f_6a88_85a3_08d3u64, 0x1319_8a2e_0370_7344 ^ bytes.len() as u64];
    for (index, part) in bytes.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        let lane = &mut lanes[index % 2];
        *lane = (*lane ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    u128::from(lanes[0]) << 64 | u128::from(lanes[1])
}
