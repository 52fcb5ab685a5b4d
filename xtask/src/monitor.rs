//! A QEMU under control: somebody looks at its screen, presses keys and resets it.
//!
//! It is told what to do by QMP, QEMU's machine protocol, over its standard input and output: JSON
//! objects, each of a line. Whatever is asked or waited for has a time limit.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{iter, thread};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::events::{self, Event};
use crate::machine::{DISK, Directory, Emulator, MachineConfig, OUTPUT, Running, qemu_command};
use crate::screen::Picture;

/// How long QEMU itself may take to do what it is asked for.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the screen or a serial port is left alone between two looks.
const INTERVAL: Duration = Duration::from_millis(50);
/// A picture of the screen.
const PICTURE: &str = "screen.ppm";

/// A running QEMU, killed when dropped.
pub struct QemuControl {
    // Fields are dropped in this order: the emulator before its directory.
    running: Running,
    commands: ChildStdin,
    replies: Receiver<Value>,
    config: MachineConfig,
    directory: Directory,
}

impl QemuControl {
    /// Starts the machine, which works on a copy of its disk. If it resets itself, it starts again.
    ///
    /// # Errors
    /// If it cannot be made or started, or is no machine of QEMU's.
    pub fn start(config: &MachineConfig) -> Result<Self> {
        config.check()?;
        let Emulator::Qemu(accelerator) = config.emulator else {
            bail!("only QEMU can be controlled");
        };
        let directory = Directory::new()?;
        fs::copy(&config.image, directory.file(DISK))
            .with_context(|| format!("cannot copy {}", config.image.display()))?;
        let mut command = qemu_command(config, accelerator, &directory, None)?;
        command
            .args(["-qmp", "stdio"])
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(directory.file(OUTPUT))?);
        let mut running = Running::start(command)?;
        let pipes = running.0.stdin.take().zip(running.0.stdout.take());
        let (commands, output) = pipes.context("no pipes")?;
        let replies = read_objects(output);
        let mut control = Self { running, commands, replies, config: config.clone(), directory };
        control.ask("qmp_capabilities", &json!({}))?;
        Ok(control)
    }

    /// Asks QEMU for something and waits until it has done it; its answer.
    fn ask(&mut self, what: &str, arguments: &Value) -> Result<Value> {
        let command = json!({ "execute": what, "arguments": arguments });
        let sent = writeln!(self.commands, "{command}").and_then(|()| self.commands.flush());
        if sent.is_err() {
            return Err(self.gone(what));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // In between come its greeting and events.
            match self.replies.recv_timeout(left) {
                Ok(mut reply) if reply.get("return").is_some() => return Ok(reply["return"].take()),
                Ok(reply) if reply.get("error").is_some() => {
                    bail!("QEMU does not obey {command}: {}", reply["error"])
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("QEMU does not answer {command}"),
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone(what)),
            }
        }
    }

    fn gone(&mut self, what: &str) -> anyhow::Error {
        let said = self.directory.text(OUTPUT).unwrap_or_default();
        let status = self.running.0.try_wait().ok().flatten();
        let status = status.map_or_else(String::new, |status| format!(" ({status})"));
        anyhow::anyhow!("QEMU has ended{status} before {what}: {said}")
    }

    /// What is on the screen.
    ///
    /// # Errors
    /// If QEMU does not tell.
    pub fn screen(&mut self) -> Result<Picture> {
        self.ask("screendump", &json!({ "filename": PICTURE }))?;
        Picture::from_ppm(&fs::read(self.directory.file(PICTURE))?)
    }

    /// Presses and releases a key, by QEMU's name for it: `a`, `ret`, `spc`, `esc`, ...
    ///
    /// # Errors
    /// If there is no such key.
    pub fn press(&mut self, key: &str) -> Result<()> {
        let keys = json!({ "keys": [{ "type": "qcode", "data": key }] });
        self.ask("send-key", &keys).map(drop)
    }

    /// Presses the machine's reset button: memory keeps its content.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn reset(&mut self) -> Result<()> {
        self.ask("system_reset", &json!({})).map(drop)
    }

    /// What was written to the first serial port so far.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn serial(&self) -> Result<String> {
        self.directory.serial(self.config.firmware)
    }

    /// The events so far.
    ///
    /// # Errors
    /// If one is not what it should be.
    pub fn events(&self) -> Result<Vec<Event>> {
        events::parse_lines(&self.directory.events(self.config.firmware)?)
    }

    /// The machine's disk. It is the machine's while that runs.
    pub fn disk(&self) -> PathBuf {
        self.directory.file(DISK)
    }

    /// Waits until the first serial port has said this as often as that.
    ///
    /// # Errors
    /// If it has not in the machine's time; with what it has said.
    pub fn wait_for_serial(&mut self, text: &str, times: usize) -> Result<()> {
        let mut said = String::new();
        let seen = self.wait(|control| {
            said = control.serial()?;
            Ok((said.matches(text).count() >= times).then_some(()))
        })?;
        seen.with_context(|| format!("the first serial port does not say {text:?}:\n{said}"))
    }

    /// Waits until a file in the machine's directory has this text in it.
    ///
    /// # Errors
    /// If it has not in the machine's time; with what it has.
    pub fn wait_for_text(&mut self, file: &str, text: &str) -> Result<()> {
        let mut said = String::new();
        let seen = self.wait(|control| {
            said = control.directory.text(file)?;
            Ok(said.contains(text).then_some(()))
        })?;
        seen.with_context(|| format!("{file} does not say {text:?}:\n{said}"))
    }

    /// Waits until `look` finds what it looks for on the screen.
    ///
    /// # Errors
    /// If it does not in the machine's time.
    pub fn wait_for_screen<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut(&Picture) -> Option<T>,
    ) -> Result<T> {
        let found = self.wait(|control| Ok(look(&control.screen()?)))?;
        found.with_context(|| format!("the screen does not show {what}"))
    }

    fn wait<T>(
        &mut self,
        mut look: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + self.config.timeout;
        loop {
            // Asked before the last look.
            let last = Instant::now() > deadline || self.running.0.try_wait()?.is_some();
            let found = look(self)?;
            if found.is_some() || last {
                return Ok(found);
            }
            thread::sleep(INTERVAL);
        }
    }

    /// Switches the machine off, and gives what it left in a file, its disk for example.
    ///
    /// # Errors
    /// If QEMU does not end.
    pub fn quit(mut self) -> Result<Left> {
        self.ask("quit", &json!({}))?;
        let deadline = Instant::now() + PATIENCE;
        while self.running.0.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("QEMU does not end");
            }
            thread::sleep(INTERVAL);
        }
        Ok(Left { directory: self.directory })
    }
}

/// What a machine left, removed when dropped.
pub struct Left {
    directory: Directory,
}

impl Left {
    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.directory.file(DISK)
    }
}

/// Reads QEMU's objects as they come, so that a wait for one can end.
fn read_objects(output: ChildStdout) -> Receiver<Value> {
    let (sender, receiver) = mpsc::channel();
    let mut lines = BufReader::new(output).lines();
    // Ends with QEMU, or when nobody listens any more.
    thread::spawn(move || {
        let objects = iter::from_fn(|| lines.next()?.ok())
            .filter_map(|line| serde_json::from_str(&line).ok());
        for object in objects {
            if sender.send(object).is_err() {
                break;
            }
        }
    });
    receiver
}
