//! Talking to the person at the terminal: progress, section headings, and the commands that are run.

use std::ffi::OsStr;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Whether every command and version is printed.
pub fn set_verbose(on: bool) {
    VERBOSE.store(on, Ordering::Relaxed);
}

/// Prints a line if asked to be verbose.
pub fn verbose(line: &str) {
    if VERBOSE.load(Ordering::Relaxed) {
        eprintln!("{line}");
    }
}

/// Prints a section heading.
pub fn section(title: &str) {
    println!("\n=== {title} ===");
}

/// Long work: a spinner on a terminal, lines of text elsewhere.
pub struct Step {
    name: String,
    bar: ProgressBar,
}

impl Step {
    /// Shows that the work has begun.
    pub fn start(name: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        if bar.is_hidden() {
            eprintln!("{name} …");
        } else {
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self { name: name.to_owned(), bar }
    }

    /// Shows how far it is.
    pub fn note(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("  {text}");
        } else {
            self.bar.set_message(text.to_owned());
        }
    }

    /// Shows that it is done.
    pub fn done(self) {
        let elapsed = self.bar.elapsed().as_secs_f64();
        self.bar.finish_and_clear();
        eprintln!("{}: done in {elapsed:.1} s", self.name);
    }
}

/// A command as one would type it.
pub fn render(command: &Command) -> String {
    let quote = |text: &OsStr| {
        let text = text.to_string_lossy();
        let plain = |c: char| c.is_alphanumeric() || "-_=+./:,@%".contains(c);
        if !text.is_empty() && text.chars().all(plain) {
            text.into_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    let variables = command.get_envs().filter_map(|(name, value)| {
        value.map(|value| format!("{}={}", name.to_string_lossy(), quote(value)))
    });
    let program = std::iter::once(quote(command.get_program()));
    let words = variables.chain(program).chain(command.get_args().map(quote));
    words.collect::<Vec<_>>().join(" ")
}

/// Runs a command whose output the person sees.
///
/// # Errors
/// If it cannot be started or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = render(command);
    verbose(&format!("$ {shown}"));
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Runs a command and returns its output, whatever its status.
///
/// # Errors
/// If it cannot be started.
pub fn capture(command: &mut Command) -> Result<Output> {
    let shown = render(command);
    verbose(&format!("$ {shown}"));
    command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_one_would_type_them() {
        let mut command = Command::new("mmdebstrap");
        command.env("A", "x y").args(["--opt=a", "it's", ""]);
        assert_eq!(render(&command), r"A='x y' mmdebstrap --opt=a 'it'\''s' ''");
    }

    #[test]
    fn a_failing_command_is_named() {
        let error = run(Command::new("false").arg("-x")).unwrap_err();
        assert!(error.to_string().starts_with("false -x: "), "{error}");
        let error = run(&mut Command::new("/nonexistent/tool")).unwrap_err();
        assert!(error.to_string().contains("cannot run /nonexistent/tool"), "{error}");
    }
}
