//! After a disaster: the first repository of a recovered group, and the state in the directory of a lone survivor.

use crate::base::{Base, BaseError, ImageMark, Pairs};
use crate::checkpoint::encode_members;
use crate::core::{MdsConfig, MdsCore};
use crate::redb_base::RedbBase;
use crate::repository::{self, Identity, Repository, RepositoryError, log_config};
use cairn_consensus::{Initial, Members, SnapshotMeta};
use cairn_env_real::OfflineDisk;
use cairn_stdx::Rng;
use cairn_types::{Instant, Level, MdsId};
use cairn_wire::{Effects, Event, Now, Process};
use std::path::Path;

/// Pairs written or read at a time.
const STEP: usize = 4096;
/// Term of the first entry after a recovery without an older one to go by: above any that was reached.
pub const TERM_MARGIN: u64 = 1 << 20;

/// Why a state cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum DisasterError {
    /// The directory.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The image.
    #[error(transparent)]
    Image(#[from] BaseError),
    /// The system refused.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The survivor's log cannot be read.
    #[error("{0}")]
    Log(String),
}

/// Makes the repository of the only server of a group whose state is `pairs`: it stands at `index` of a log that begins
/// there, and servers that join later receive it.
///
/// # Errors
/// [`DisasterError`]; the directory then has no `mds.json` and is no repository.
pub fn create(dir: &Path, identity: &Identity, index: u64, term: u64, pairs: &Pairs) -> Result<(), DisasterError> {
    let mut base = RedbBase::open(&dir.join("image.redb"))?;
    let only = (MdsId(identity.id), identity.instance);
    let initial = fill(&mut base, only, index, term, pairs)?;
    drop(base);
    repository::create(dir, identity, &initial)?;
    Ok(())
}

/// Puts a recovered state into the image of the only server of a group, id and instance; gives what its log is to be
/// formatted with.
///
/// # Errors
/// [`BaseError`] when the image cannot be written.
pub fn fill<B: Base>(
    base: &mut B,
    only: (MdsId, u64),
    index: u64,
    term: u64,
    pairs: &Pairs,
) -> Result<Initial, BaseError> {
    let members = Members { voters: [only].into(), learners: Default::default() };
    let mark = ImageMark { index, term, members: encode_members(&members) };
    base.begin_install();
    for step in pairs.chunks(STEP) {
        base.install(step.to_vec(), None);
        written(base)?;
    }
    base.install(Pairs::new(), Some(mark));
    written(base)?;
    Ok(Initial::Image(SnapshotMeta { index, term, members }))
}

fn written<B: Base>(base: &mut B) -> Result<(), BaseError> {
    loop {
        if let Some(outcome) = base.poll() {
            return outcome;
        }
        std::thread::yield_now();
    }
}

/// The state of a stopped server, up to the last entry it knew as committed, and its term. Its directory stays as it
/// is: the image is copied into `scratch`, and what opening the log writes stays in memory.
///
/// # Errors
/// [`DisasterError`] when image or log cannot be read.
pub fn read(dir: &Path, scratch: &Path) -> Result<(Identity, u64, Pairs), DisasterError> {
    let repository = Repository::open(dir)?;
    let identity = repository.identity.clone();
    let copy = scratch.join(format!(".image-of-a-survivor.{}", std::process::id()));
    let state =
        crate::redb_base::contain(|| read_copied(dir, &identity, &copy)).unwrap_or_else(|error| Err(error.into()));
    let _ = std::fs::remove_file(&copy);
    let (term, pairs) = state?;
    Ok((identity, term, pairs))
}

fn read_copied(dir: &Path, identity: &Identity, copy: &Path) -> Result<(u64, Pairs), DisasterError> {
    let io = |action: &str, path: &Path| {
        let action = format!("{action} {}", path.display());
        move |source| DisasterError::Io { action, source }
    };
    let image = dir.join("image.redb");
    if image.exists() {
        std::fs::copy(&image, copy).map_err(io("copy", &image))?;
    }
    let base = RedbBase::open(copy)?;
    let log = dir.join("log");
    let mut disk = OfflineDisk::open(&log).map_err(io("open", &log))?;
    let config = MdsConfig {
        id: MdsId(identity.id),
        level: Level::CURRENT,
        cluster: identity.cluster_id().unwrap_or_default(),
        cluster_name: identity.cluster_name.clone(),
        addr: identity.addr,
        repository: dir.display().to_string(),
        servers: identity.servers(),
        bootstrap: false,
        log: log_config(identity),
        checkpoint_bytes: usize::MAX,
    };
    let mut core = MdsCore::new(config, base, Rng::new(1));
    let mut effects = Effects::default();
    // Its clock stands still, so it campaigns for nothing: it only applies what it knows as committed.
    let now = Now { mono: Instant(0), wall_ns: 0 };
    core.step(now, Event::Start, &mut effects);
    let mut applied = None;
    loop {
        if let Some(reason) = effects.fatal.take() {
            return Err(DisasterError::Log(reason));
        }
        let requests = std::mem::take(&mut effects.disk);
        // Committed entries are handed out in portions, one a turn.
        if requests.is_empty() && applied.replace(core.applied()) == Some(core.applied()) {
            break;
        }
        for (index, request) in requests {
            core.step(now, Event::Disk(index, disk.run(request)), &mut effects);
        }
        core.step(now, Event::Turn, &mut effects);
    }
    let status = core.consensus().status();
    if status.state_lost {
        let text = "the metadata image is lost or damaged, and the log alone is not enough; read another survivor, or a backup";
        return Err(DisasterError::Log(text.to_owned()));
    }
    if core.applied() < status.committed {
        let (applied, committed) = (core.applied(), status.committed);
        return Err(DisasterError::Log(format!("the log ends at {applied} and {committed} was committed")));
    }
    let mut meta = core.into_meta();
    meta.checkpoint();
    let mut pairs = Pairs::new();
    loop {
        let page = meta.image_page(pairs.last().map(|(key, _)| key.as_slice()), STEP);
        if page.is_empty() {
            return Ok((status.term, pairs));
        }
        pairs.extend(page);
    }
}
