//! `get-attr` and `set-attr`: replication and placement of files and directories on a mount, or of block volumes.

use crate::context::{Context, unexpected};
use crate::exit::usage;
use anyhow::{Context as _, Result, bail};
use cairn_types::InodeId;
use cairn_wire::mds::{MdsReply, MdsRequest};
use clap::Args;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Options of `get-attr`.
#[derive(Args, Debug)]
pub struct GetAttrArgs {
    /// Directory or file on a mount; or with -p a path inside the cluster.
    path: PathBuf,
    /// The path is inside the cluster, from its root; nothing needs to be mounted.
    #[arg(short = 'p')]
    in_cluster: bool,
}

/// Options of `set-attr`.
#[derive(Args, Debug)]
pub struct SetAttrArgs {
    /// Everything below the path too.
    #[arg(short = 'R')]
    recursive: bool,
    /// The path is inside the cluster, from its root; nothing needs to be mounted.
    #[arg(short = 'p')]
    in_cluster: bool,
    /// Directory or file.
    path: PathBuf,
    /// `replicas=N[:M]`, `failure-domain=disk|host|rack|row|room|site`, `tier=0..3`, `chunk-size=SIZE`.
    #[arg(required = true)]
    pairs: Vec<String>,
}

/// Finds the inode of a path; on a mount the inode number is the one of the cluster.
async fn inode_of(client: &cairn_client::LocalClient, path: &Path, in_cluster: bool) -> Result<InodeId> {
    if !in_cluster {
        let meta = std::fs::symlink_metadata(path).with_context(|| format!("look at {}", path.display()))?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let device = format!("{}:{}", libc::major(meta.dev()), libc::minor(meta.dev()));
        let on_cairn = mounts
            .lines()
            .any(|line| line.split_whitespace().nth(2) == Some(device.as_str()) && line.contains(" - fuse.cairn "));
        if !on_cairn {
            bail!("{} is not on a mounted cluster; mount it, or use -p with a path inside the cluster", path.display());
        }
        return Ok(InodeId(meta.ino()));
    }
    let path = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec();
    let named = || format!("look up {} in the cluster", String::from_utf8_lossy(&path));
    match client.call(MdsRequest::Resolve { path: path.clone() }).await.with_context(named)? {
        MdsReply::Attr(attr) => Ok(attr.inode),
        other => Err(unexpected(&other)),
    }
}

/// Runs `get-attr`.
pub fn get(context: &Context, args: &GetAttrArgs) -> Result<()> {
    let pairs = context.block_on(async |client| {
        let inode = inode_of(&client, &args.path, args.in_cluster).await?;
        match client.call(MdsRequest::AttributesGet { inode }).await? {
            MdsReply::Pairs(pairs) => Ok(pairs),
            other => Err(unexpected(&other)),
        }
    })?;
    if context.json() {
        let map: std::collections::BTreeMap<_, _> = pairs.into_iter().collect();
        println!("{}", serde_json::to_string_pretty(&map)?);
        return Ok(());
    }
    println!("Cluster {}, {}:", context.name()?, args.path.display());
    pairs.iter().for_each(|(key, value)| println!("  {key}={value}"));
    Ok(())
}

/// Runs `set-attr`.
pub fn set(context: &Context, args: &SetAttrArgs) -> Result<()> {
    let (mut pairs, mut paths) = (Vec::new(), vec![args.path.clone()]);
    for word in &args.pairs {
        // The guide also writes the path and the attribute as one word: `set-attr -p /failure-domain=host`.
        match word.split_once('=') {
            Some((key, value)) => pairs.push((key.trim_start_matches('/').to_owned(), value.to_owned())),
            None => return Err(usage(format!("`{word}` is not key=value, as in replicas=3:2"))),
        }
    }
    let changed = context.block_on(async |client| {
        let mut queue: Vec<InodeId> = Vec::new();
        for path in paths.drain(..) {
            queue.push(inode_of(&client, &path, args.in_cluster).await?);
        }
        let mut changed = 0u64;
        while let Some(inode) = queue.pop() {
            let outcome = client.call(MdsRequest::AttributesSet { inode, pairs: pairs.clone() }).await;
            outcome.with_context(|| {
                if changed == 0 {
                    "nothing was changed".to_owned()
                } else {
                    format!("{changed} files and directories were changed, then {inode} was refused")
                }
            })?;
            changed += 1;
            if args.recursive {
                queue.extend(children(&client, inode).await?);
            }
        }
        Ok(changed)
    })?;
    if args.recursive {
        eprintln!("{changed} files and directories changed");
    }
    Ok(())
}

async fn children(client: &cairn_client::LocalClient, inode: InodeId) -> Result<Vec<InodeId>> {
    use cairn_wire::mds::{InodeKind, MdsError};
    let (mut found, mut cookie) = (Vec::new(), 0);
    loop {
        match client.call(MdsRequest::ReadDir { inode, cookie, limit: 1000, attributes: false }).await {
            Ok(MdsReply::Entries { entries, end }) => {
                cookie = entries.last().map_or(cookie, |entry| entry.cookie);
                let kinds = [InodeKind::File, InodeKind::Directory];
                found.extend(entries.iter().filter(|entry| kinds.contains(&entry.kind)).map(|entry| entry.inode));
                if end {
                    return Ok(found);
                }
            }
            Err(MdsError::Posix(libc::ENOTDIR)) => return Ok(found),
            Ok(other) => return Err(unexpected(&other)),
            Err(error) => return Err(error.into()),
        }
    }
}
