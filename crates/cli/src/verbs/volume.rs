//! `cairn volume …`: block volumes.

use crate::context::{Context, unexpected};
use anyhow::{Result, bail};
use cairn_types::{FailureDomain, Redundancy, format_size};
use cairn_wire::mds::{MdsReply, MdsRequest, VolumeInfo, VolumeOptions};
use clap::Subcommand;
use serde_json::json;
use std::io::{BufRead, IsTerminal, Write};

/// Verbs of volumes.
#[derive(Subcommand, Debug)]
pub enum VolumeVerb {
    /// Creates a volume; it takes space only as it is written.
    Create {
        /// Its name.
        name: String,
        /// Its size, as 10G.
        #[arg(value_parser = crate::size)]
        size: u64,
        /// Copies, as 3 or 3:2.
        #[arg(long)]
        replicas: Option<Redundancy>,
        /// On which level copies differ: disk, host, rack, row, room, site.
        #[arg(long)]
        failure_domain: Option<FailureDomain>,
        /// Tier, 0 to 3.
        #[arg(long)]
        tier: Option<u8>,
        /// Chunk size, a power of two from 1M to 256M.
        #[arg(long, value_parser = crate::size)]
        chunk_size: Option<u64>,
    },
    /// Lists the volumes.
    List,
    /// Shows one volume.
    Info {
        /// Name or id.
        name: String,
    },
    /// Changes the size.
    Resize {
        /// Name or id.
        name: String,
        /// New size.
        #[arg(value_parser = crate::size)]
        size: u64,
        /// Allow it to become smaller; what lies past the end is lost.
        #[arg(long)]
        shrink: bool,
    },
    /// Deletes a volume and its data.
    Delete {
        /// Name or id.
        name: String,
        /// Do not ask.
        #[arg(short = 'y', long)]
        yes: bool,
    },
    /// Renames a volume.
    Rename {
        /// Name or id.
        name: String,
        /// New name.
        new_name: String,
    },
}

/// Runs the verb.
pub fn run(context: &Context, verb: &VolumeVerb) -> Result<()> {
    match verb {
        VolumeVerb::Create { name, size, replicas, failure_domain, tier, chunk_size } => {
            let options = VolumeOptions {
                redundancy: *replicas,
                failure_domain: *failure_domain,
                tier: *tier,
                chunk_size: *chunk_size,
            };
            let request = MdsRequest::VolumeCreate { name: name.clone(), size: *size, options };
            show(context, &volume_of(context.call(request)?)?)
        }
        VolumeVerb::List => list(context),
        VolumeVerb::Info { name } => show(context, &find(context, name)?),
        VolumeVerb::Resize { name, size, shrink } => {
            let volume = find(context, name)?.volume;
            context.call(MdsRequest::VolumeResize { volume, size: *size, shrink: *shrink })?;
            show(context, &find(context, name)?)
        }
        VolumeVerb::Delete { name, yes } => delete(context, name, *yes),
        VolumeVerb::Rename { name, new_name } => {
            let volume = find(context, name)?.volume;
            context.call(MdsRequest::VolumeRename { volume, name: new_name.clone() })?;
            show(context, &find(context, new_name)?)
        }
    }
}

fn volume_of(reply: MdsReply) -> Result<VolumeInfo> {
    match reply {
        MdsReply::Volume(info) => Ok(info),
        other => Err(unexpected(&other)),
    }
}

/// The volume called `name`.
pub fn find(context: &Context, name: &str) -> Result<VolumeInfo> {
    volume_of(context.call(MdsRequest::VolumeGet { name: name.to_owned() })?)
}

fn to_json(info: &VolumeInfo) -> serde_json::Value {
    json!({
        "id": info.volume.0, "name": info.name, "size": info.size, "chunk_size": info.chunk_size,
        "replicas": info.redundancy.to_string(), "failure_domain": info.failure_domain.name(), "tier": info.tier,
        "chunks": info.chunks, "created_ns": info.created_ns,
        "holder": info.holder.map(|(client, epoch)| json!({"client": client.0, "epoch": epoch.0})),
    })
}

fn show(context: &Context, info: &VolumeInfo) -> Result<()> {
    if context.json() {
        println!("{}", serde_json::to_string_pretty(&to_json(info))?);
        return Ok(());
    }
    println!("name            {}", info.name);
    println!("id              {}", info.volume.0);
    println!("size            {} ({} bytes)", format_size(info.size), info.size);
    println!("replicas        {}", info.redundancy);
    println!("failure domain  {}", info.failure_domain);
    println!("tier            {}", info.tier);
    println!("chunks          {} of {} each", info.chunks, format_size(info.chunk_size));
    match info.holder {
        Some((client, epoch)) => println!("in use by       {client} ({epoch})"),
        None => println!("in use by       nobody"),
    }
    Ok(())
}

fn list(context: &Context) -> Result<()> {
    let volumes = context.block_on(async |client| {
        let mut all: Vec<VolumeInfo> = Vec::new();
        loop {
            let after = all.last().map_or(String::new(), |info| info.name.clone());
            match client.call(MdsRequest::VolumeList { after, limit: 1000 }).await? {
                MdsReply::Volumes { volumes, end } => {
                    all.extend(volumes);
                    if end {
                        return Ok(all);
                    }
                }
                other => return Err(unexpected(&other)),
            }
        }
    })?;
    if context.json() {
        let all: Vec<_> = volumes.iter().map(to_json).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{:<24} {:>10} {:>9} {:>8} {:>5}  IN USE BY", "NAME", "SIZE", "REPLICAS", "CHUNKS", "TIER");
    for info in &volumes {
        let size = format_size(info.size);
        let holder = info.holder.map_or("-".to_owned(), |(client, _)| client.to_string());
        let replicas = info.redundancy.to_string();
        println!("{:<24} {size:>10} {replicas:>9} {:>8} {:>5}  {holder}", info.name, info.chunks, info.tier);
    }
    Ok(())
}

fn delete(context: &Context, name: &str, yes: bool) -> Result<()> {
    let info = find(context, name)?;
    if !yes {
        if !std::io::stdin().is_terminal() {
            bail!("deleting volume {} loses its data; say --yes", info.name);
        }
        eprint!("Delete volume {} of {} with all its data? [y/N] ", info.name, format_size(info.size));
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            bail!("nothing was deleted");
        }
    }
    context.call(MdsRequest::VolumeDelete { volume: info.volume })?;
    Ok(())
}
