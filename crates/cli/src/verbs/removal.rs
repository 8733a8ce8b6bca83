//! What removing a chunk server would mean: `rm-cs --dry-run`, and the list behind a refused `rm-cs -f`.

use crate::context::{Context, unexpected};
use anyhow::{Result, bail};
use cairn_client::LocalClient;
use cairn_types::{CsId, InodeId, VolumeId};
use cairn_wire::mds::{InodeKind, LostChunks, MdsReply, MdsRequest};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// Entries of the tree looked at to name files that would be lost.
const WALK_MAX: usize = 200_000;
/// Entries asked for at once.
const PAGE: u32 = 1000;

/// A volume or file that would be lost, by a name people know.
struct Lost {
    name: String,
    chunks: LostChunks,
}

/// What the cluster says of a removal.
struct Removal {
    chunks: u64,
    lost: Vec<Lost>,
    drain: Option<String>,
    force: Option<String>,
}

async fn examine(client: &LocalClient, cs: CsId) -> Result<Removal> {
    let mut all = Removal { chunks: 0, lost: Vec::new(), drain: None, force: None };
    let mut from = (VolumeId(0), 0);
    loop {
        let request = MdsRequest::CsExamine { cs, volume: from.0, index: from.1 };
        let (chunks, lost, next) = match client.call(request).await? {
            MdsReply::CsExamined { chunks, lost, next, drain, force } => {
                (all.drain, all.force) = (drain, force);
                (chunks, lost, next)
            }
            other => return Err(unexpected(&other)),
        };
        all.chunks += chunks;
        for found in lost {
            // A volume may go on in the next piece.
            match all.lost.last_mut().filter(|last| last.chunks.volume == found.volume) {
                Some(last) => {
                    last.chunks.only += found.only;
                    last.chunks.unreachable += found.unreachable;
                }
                None => all.lost.push(Lost { name: String::new(), chunks: found }),
            }
        }
        match next {
            Some(next) => from = next,
            None => break,
        }
    }
    let is_file = |lost: &&Lost| lost.chunks.name.is_empty();
    let files: BTreeSet<InodeId> = all.lost.iter().filter(is_file).map(|lost| InodeId(lost.chunks.volume.0)).collect();
    let paths = if files.is_empty() { BTreeMap::new() } else { find_paths(client, files).await? };
    for lost in &mut all.lost {
        lost.name = match (lost.chunks.name.as_str(), paths.get(&InodeId(lost.chunks.volume.0))) {
            ("", Some(path)) => path.clone(),
            ("", None) => format!("the file with inode {}", lost.chunks.volume.0),
            (name, _) => format!("volume {name}"),
        };
    }
    Ok(all)
}

/// Paths of files, as far as a bounded walk finds them.
async fn find_paths(client: &LocalClient, mut wanted: BTreeSet<InodeId>) -> Result<BTreeMap<InodeId, String>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![(InodeId::ROOT, String::new())];
    let mut looked = 0;
    while let Some((directory, path)) = directories.pop() {
        let mut cookie = 0;
        loop {
            let request = MdsRequest::ReadDir { inode: directory, cookie, limit: PAGE, attributes: false };
            // It may have been removed since it was listed.
            let Ok(MdsReply::Entries { entries, end }) = client.call(request).await else { break };
            looked += entries.len();
            for entry in &entries {
                cookie = entry.cookie;
                let name = || format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                if entry.kind == InodeKind::Directory {
                    directories.push((entry.inode, name()));
                } else if wanted.remove(&entry.inode) {
                    found.insert(entry.inode, name());
                }
            }
            if wanted.is_empty() || looked >= WALK_MAX {
                return Ok(found);
            }
            if end || entries.is_empty() {
                break;
            }
        }
    }
    Ok(found)
}

fn describe(lost: &Lost) -> String {
    let LostChunks { only, unreachable, .. } = lost.chunks;
    let mut words = Vec::new();
    if only > 0 {
        words.push(format!("{only} chunks have no other copy"));
    }
    if unreachable > 0 {
        words.push(format!("{unreachable} chunks have their other copies on servers that do not answer"));
    }
    format!("{}: {}", lost.name, words.join(", "))
}

/// Refuses to drop a server with data that is nowhere else in reach, with the list of it.
pub fn check(context: &Context, cs: CsId) -> Result<()> {
    let removal = context.block_on(async |client| examine(&client, cs).await)?;
    if let Some(why) = removal.force {
        bail!("refused: {why}");
    }
    if removal.lost.is_empty() {
        return Ok(());
    }
    removal.lost.iter().for_each(|lost| eprintln!("{}", describe(lost)));
    bail!(
        "refused: dropping {cs} would lose the data above. Bring {cs}, or the servers that do not answer, back if there is any \
         way; if there is none, `cairn rm-cs -f --lose-data {}` gives it up, and what is listed stays unreadable until it is \
         deleted",
        cs.0
    )
}

/// Shows what a removal would mean.
pub fn show(context: &Context, cs: CsId, force: bool, lose_data: bool) -> Result<()> {
    let removal = context.block_on(async |client| examine(&client, cs).await)?;
    let against = match force {
        true if !removal.lost.is_empty() && !lose_data => {
            removal.force.clone().or_else(|| Some("data would be lost".to_owned()))
        }
        true => removal.force.clone(),
        false => removal.drain.clone(),
    };
    if context.json() {
        let lost: Vec<_> = removal
            .lost
            .iter()
            .map(|lost| {
                let LostChunks { volume, only, unreachable, .. } = &lost.chunks;
                json!({"name": lost.name, "id": volume.0, "only_copy": only, "others_unreachable": unreachable})
            })
            .collect();
        let value = json!({"cs": cs.0, "force": force, "chunks": removal.chunks, "lost": lost, "refused": against});
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    match force {
        true => println!("{cs} would be dropped at once; {} chunks would be copied from the others", removal.chunks),
        false => {
            println!("{} chunks would be copied from {cs} to others; it is dropped when none is left", removal.chunks)
        }
    }
    if force {
        removal.lost.iter().for_each(|lost| println!("lost: {}", describe(lost)));
    }
    match against {
        Some(why) => println!("it would be refused: {why}"),
        None => println!("nothing speaks against it; nothing was changed"),
    }
    Ok(())
}
