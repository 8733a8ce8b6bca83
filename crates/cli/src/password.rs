//! Asking for the cluster password: from a terminal without echo, else from standard input or a file.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, IsTerminal};
use std::path::Path;

/// The cluster password. With `confirm` a terminal is asked twice.
pub fn ask(file: Option<&Path>, confirm: bool) -> Result<String> {
    if let Some(path) = file {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("read the password from {}", path.display()))?;
        return Ok(first_line(&text));
    }
    if !std::io::stdin().is_terminal() {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).context("read the password from standard input")?;
        if line.is_empty() {
            bail!("no password on standard input; give one, or a file with --password-file");
        }
        return Ok(first_line(&line));
    }
    let password = rpassword::prompt_password("Cluster password: ").context("read the password")?;
    if confirm && rpassword::prompt_password("Once more: ").context("read the password")? != password {
        bail!("the two passwords differ");
    }
    Ok(password)
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
