//! What a stopped chunk server holds: read from its directory, or from the file `cairn cs scan` made of it.
//!
//! The store is opened as its server would open it, log and all, but over a disk that only remembers what is written:
//! the directory stays as it is.

use anyhow::{Context as _, Result, bail};
use cairn_cs::Repository;
use cairn_cs::tag::{ChunkTag, CopyState};
use cairn_env_real::OfflineDisk;
use cairn_meta::recover::{FoundCopy, Listing};
use cairn_stdx::checksum::crc64;
use cairn_store::{Store, StoreError, StoreOptions, StoreOutput, StoreReply, StoreRequest};
use cairn_types::{ChunkId, ChunkVersion, CsId, Epoch, Instant, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The store's clock stands still: nothing in it waits for time.
const NOW: Instant = Instant(0);
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
    let disk =
        OfflineDisk::open(&repository.store_path()).with_context(|| format!("open the store in {}", dir.display()))?;
    let options = StoreOptions {
        cluster: Some(identity.cluster),
        store_uuid: Some(identity.store),
        cache_bytes: CACHE_BYTES,
        ..StoreOptions::default()
    };
    let mut store = Offline { store: Store::new(disk.size(), options), disk, out: StoreOutput::default(), token: 0 };
    store.open().with_context(|| format!("open the store in {}", dir.display()))?;
    let (copies, mentioned) = store.copies().with_context(|| format!("read the store in {}", dir.display()))?;
    let stats = store.store.stats();
    let repository = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned()).display().to_string();
    Ok(Listing {
        cluster: identity.cluster,
        cs: identity.cs,
        store: identity.store,
        host: identity.host,
        tier: identity.tier,
        repository,
        capacity: stats.capacity_bytes,
        used: stats.used_bytes,
        epochs: store.epochs(),
        copies,
        mentioned,
    })
}

struct Offline {
    store: Store,
    disk: OfflineDisk,
    out: StoreOutput,
    token: u64,
}

impl Offline {
    /// Carries out what the store wants of the disk until it wants nothing more.
    fn drain(&mut self) {
        loop {
            self.store.turn(NOW, &mut self.out);
            let requests = std::mem::take(&mut self.out.disk);
            if requests.is_empty() {
                return;
            }
            for request in requests {
                let done = self.disk.run(request);
                self.store.disk_done(NOW, done, &mut self.out);
            }
        }
    }

    fn open(&mut self) -> Result<()> {
        self.store.start(NOW, &mut self.out);
        self.drain();
        match self.out.opened.take() {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
            None => bail!("the store does not open"),
        }
    }

    fn ask(&mut self, request: StoreRequest) -> Result<StoreReply, StoreError> {
        self.token += 1;
        self.store.submit(NOW, self.token, request, &mut self.out);
        self.drain();
        let at = self.out.done.iter().position(|(token, _)| *token == self.token);
        at.map_or(Err(StoreError::NotOpen), |at| self.out.done.swap_remove(at).1)
    }

    fn epochs(&self) -> Vec<(VolumeId, Epoch)> {
        let mut epochs: BTreeMap<VolumeId, Epoch> = BTreeMap::new();
        for volume in self.store.volumes() {
            let fence = self.store.fence(volume).unwrap_or_default();
            let tail = self.store.tail(volume).map(|entry| entry.epoch).max().unwrap_or_default();
            epochs.insert(volume, fence.max(self.store.settled(volume).0).max(tail));
        }
        epochs.into_iter().collect()
    }

    fn copies(&mut self) -> Result<(Vec<FoundCopy>, Vec<CsId>)> {
        let mut mentioned = BTreeSet::new();
        let mut copies = Vec::new();
        let mut highest: BTreeMap<VolumeId, u64> = BTreeMap::new();
        for (chunk, info) in self.store.chunks() {
            let tag = ChunkTag::decode(&info.tag);
            let whole = matches!(&tag, Ok(tag) if !matches!(tag.state, CopyState::Rebuilding { .. }));
            mentioned.extend(tag.into_iter().flat_map(|tag| tag.replicas).map(|replica| replica.cs));
            let top = highest.entry(info.volume).or_default();
            *top = (*top).max(info.index);
            copies.push(FoundCopy {
                chunk,
                volume: info.volume,
                index: info.index,
                version: info.version,
                block_count: info.block_count,
                mapped_blocks: info.mapped_blocks,
                end_block: None,
                whole,
            });
        }
        for copy in copies.iter_mut().filter(|copy| highest[&copy.volume] == copy.index) {
            copy.end_block = Some(self.end_block(copy.chunk)?);
        }
        copies.sort_by_key(|copy| (copy.volume, copy.index, copy.chunk));
        Ok((copies, mentioned.into_iter().collect()))
    }

    /// One past the last block that holds data.
    fn end_block(&mut self, chunk: ChunkId) -> Result<u32> {
        let (mut end, mut from_block) = (0, 0);
        loop {
            let request = StoreRequest::ChangedSince { chunk, version: ChunkVersion(0), from_block, limit: 1024 };
            let StoreReply::Changed { ranges, next } = self.ask(request)? else {
                bail!("an answer to another question")
            };
            let mapped = ranges.iter().filter(|range| range.mapped);
            end = mapped.map(|range| range.first_block + range.block_count).max().unwrap_or(0).max(end);
            match next {
                Some(next) => from_block = next,
                None => return Ok(end),
            }
        }
    }
}
