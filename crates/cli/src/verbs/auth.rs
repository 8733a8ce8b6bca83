//! `auth-node`: checks the cluster password with the cluster, then keeps the key on this node.

use crate::context::{Context, block_on_config};
use crate::password;
use anyhow::Result;
use cairn_wire::auth::ClusterKey;
use cairn_wire::mds::{MdsRequest, SessionKind};
use clap::Args;
use std::path::PathBuf;

/// Options of `auth-node`.
#[derive(Args, Debug)]
pub struct AuthNodeArgs {
    /// Read the password from a file instead of asking.
    #[arg(long)]
    password_file: Option<PathBuf>,
    /// Metadata servers of the cluster; kept in bs.list.
    #[arg(short = 'b', value_delimiter = ',')]
    bootstrap: Vec<String>,
}

/// Runs `auth-node`.
pub fn run(context: &Context, args: &AuthNodeArgs) -> Result<()> {
    let name = context.name()?;
    let context = &context.with_bootstrap(&args.bootstrap)?;
    context.mds()?;
    let password = password::ask(args.password_file.as_deref(), false)?;
    let key = ClusterKey::derive(name, &password)?;
    let config = context.client_config_with_key(key.clone(), SessionKind::Admin, "auth-node")?;
    block_on_config(config, async |client| Ok(client.call(MdsRequest::Topology).await?))?;
    let files = context.files()?;
    // Nothing is kept before the cluster has agreed: a mistake leaves nothing behind.
    files.write_key(&key)?;
    context.keep_bootstrap()?;
    eprintln!("this node may now use cluster {name}; its key is in {}", files.key_path().display());
    Ok(())
}
