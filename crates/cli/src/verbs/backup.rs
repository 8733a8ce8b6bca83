//! `backup-metadata`: the state of a running cluster at one moment, in a file.

use crate::context::{Context, unexpected};
use anyhow::{Context as _, Result, bail};
use cairn_client::LocalClient;
use cairn_mds::backup_file::{BackupHeader, BackupWriter};
use cairn_types::ClusterId;
use cairn_wire::mds::{MdsError, MdsReply, MdsRequest};
use clap::Args;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often to ask whether the state is written down, and how many times.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const LOOKS_MAX: u32 = 3000;
/// A change of leadership in the middle begins the backup anew, so many times.
const TRIES: u32 = 3;

/// Options of `backup-metadata`.
#[derive(Args, Debug)]
pub struct BackupArgs {
    /// File to write; an older one is replaced once the new one is complete.
    file: PathBuf,
}

/// Runs `backup-metadata`.
pub fn run(context: &Context, args: &BackupArgs) -> Result<()> {
    let name = context.name()?.to_owned();
    let temporary = args.file.with_extension(format!("new.{}", std::process::id()));
    let made = context.block_on(async |client| {
        let cluster = client.cluster().context("the cluster says who it is")?;
        let mut tries = 0;
        loop {
            tries += 1;
            match write(&client, cluster, &name, &temporary).await {
                Err(error) if tries < TRIES && error.downcast_ref::<MdsError>().is_some() => {
                    eprintln!("begins again: {error:#}");
                }
                outcome => return outcome,
            }
        }
    });
    let outcome = made.and_then(|made| {
        std::fs::rename(&temporary, &args.file).with_context(|| format!("write {}", args.file.display()))?;
        let dir = args.file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("sync {}", dir.display()))?;
        Ok(made)
    });
    let (index, count) = outcome.inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })?;
    eprintln!("the metadata of {name} at index {index} ({count} records) are in {}", args.file.display());
    Ok(())
}

async fn write(client: &LocalClient, cluster: ClusterId, name: &str, path: &Path) -> Result<(u64, u64)> {
    let token = u64::from_le_bytes(cairn_env_real::random_bytes());
    let mut writer = None;
    let (mut page, mut looks) = (0, 0);
    loop {
        let (index, term, pairs, ready) = match client.call(MdsRequest::StatePage { token, page }).await? {
            MdsReply::StatePage { index, term, pairs, ready } => (index, term, pairs, ready),
            other => return Err(unexpected(&other)),
        };
        if !ready {
            looks += 1;
            if looks > LOOKS_MAX {
                bail!("the metadata servers do not get their state written down; see their logs");
            }
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        }
        if writer.is_none() {
            let header =
                BackupHeader { cluster, name: name.to_owned(), index, term, wall_ns: cairn_env_real::clock::wall_ns() };
            let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
            writer = Some(BackupWriter::begin(BufWriter::new(file), &header).context("write the backup")?);
        }
        if pairs.is_empty() {
            let writer = writer.take().expect("made with the first page");
            let (file, count) = writer.end().context("write the backup")?;
            let file = file.into_inner().map_err(|error| error.into_error()).context("write the backup")?;
            file.sync_all().context("sync the backup")?;
            return Ok((index, count));
        }
        writer.as_mut().expect("made above").pairs(&pairs).context("write the backup")?;
        page += 1;
    }
}
