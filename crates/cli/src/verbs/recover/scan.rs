//! What a stopped chunk server holds: read from its directory, or from the file `cairn cs scan` made of it.
//!
//! The store is opened as its server would open it, log and all (`cairn_cs::scan`), but over a disk that only remembers
//! what is written: the directory stays as it is.

use anyhow::{Context as _, Result, bail};
use cairn_cs::Repository;
use cairn_env_real::OfflineDisk;
use cairn_meta::recover::Listing;
use cairn_stdx::checksum::crc64;
use cairn_store::StoreOptions;
use std::path::Path;

/// First bytes of a file of listings: kind and version.
const MAGIC: [u8; 8] = *b"CAIRNSC\x01";
/// Memory for the index of a store.
const CACHE_BYTES: u64 = 64 << 20;

/// The listings of a source: the directory of a chunk server, or a file of them.
pub fn read_source(source: &Path, cluster_name: &str) -> Result<Vec<Listing>> {
    if source.is_dir() {
        return Ok(vec![scan(source, cluster_name)?]);
    }
    let bytes = std::fs::read(source).with_context(|| format!("read {}", source.display()))?;
    let Some((magic, rest)) = bytes.split_first_chunk::<8>() else { bail!("{} is too short", source.display()) };
    if *magic != MAGIC {
        bail!("{} is neither the directory of a chunk server nor a file of `cairn cs scan`", source.display());
    }
    let body = rest.split_first_chunk::<8>().filter(|(crc, body)| crc64(body).to_le_bytes() == **crc);
    let Some((_, body)) = body else { bail!("{} is damaged; make it again", source.display()) };
    let (name, listings): (String, Vec<Listing>) =
        cairn_wire::decode("listing", body).with_context(|| format!("read {}", source.display()))?;
    if name != cluster_name {
        bail!("{} is of cluster {name}, not {cluster_name}", source.display());
    }
    Ok(listings)
}

/// The bytes of a file of listings.
pub fn to_file(cluster_name: &str, listings: &[Listing]) -> Vec<u8> {
    let body = cairn_wire::encode(&(cluster_name, listings));
    [&MAGIC[..], &crc64(&body).to_le_bytes(), &body].concat()
}

/// Reads the directory of a stopped chunk server.
pub fn scan(dir: &Path, cluster_name: &str) -> Result<Listing> {
    let repository = Repository::open(dir, cluster_name).map_err(|error| match error {
        cairn_cs::RepositoryError::InUse { dir } => {
            anyhow::anyhow!("the chunk server in {} runs; stop it first", dir.display())
        }
        other => other.into(),
    })?;
    let identity = repository.identity().clone();
    let mut disk =
        OfflineDisk::open(&repository.store_path()).with_context(|| format!("open the store in {}", dir.display()))?;
    let options = StoreOptions {
        cluster: Some(identity.cluster),
        store_uuid: Some(identity.store),
        cache_bytes: CACHE_BYTES,
        ..StoreOptions::default()
    };
    let held = cairn_cs::scan::scan(disk.size(), options, |request| disk.run(request))
        .with_context(|| format!("read the store in {}", dir.display()))?;
    let repository = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned()).display().to_string();
    Ok(Listing {
        cluster: identity.cluster,
        cs: identity.cs,
        store: identity.store,
        host: identity.host,
        tier: identity.tier,
        repository,
        capacity: held.capacity,
        used: held.used,
        epochs: held.epochs,
        copies: held.copies,
        mentioned: held.mentioned,
    })
}
