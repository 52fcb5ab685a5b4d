//! `hv.toml`, the hypervisor's configuration, and the guest images that it names.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize, Serializer};
pub use sld::{Policy, Source as SldSource};

use crate::guests::{self, GUESTS};

/// What the machine does when all is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtEnd {
    /// The last page stays on the screen.
    Stay,
    /// It switches itself off.
    PowerOff,
    /// It restarts.
    Reboot,
}

/// The file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HvConfig {
    /// The policy of VMs that say nothing.
    #[serde(serialize_with = "as_text")]
    pub sld: Policy,
    /// Where split locks of VMs that say nothing are detected; `auto` without it.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text_if_any")]
    pub source: Option<SldSource>,
    /// What the machine does at the end; it stays on without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_end: Option<AtEnd>,
    /// A vCPU's turn, in ticks of the time-stamp counter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice_ticks: Option<u64>,
    /// How many CPUs are used at most; all without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Whether the invariants are checked at each load, put and switch.
    #[serde(skip_serializing_if = "is_default")]
    pub verify: bool,
    /// Whether each load and put is an event.
    #[serde(skip_serializing_if = "is_default")]
    pub schedule_events: bool,
    /// A vCPU that had so many VM exits on a CPU moves to the next at the end of its turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migrate_exits: Option<u64>,
    /// All VMs are ended once there were so many vCPU loads in total.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_after_loads: Option<u64>,
    /// Whether the serial ports that have the log take commands.
    #[serde(skip_serializing_if = "is_default")]
    pub console: bool,
    /// The VMs.
    #[serde(rename = "vm")]
    pub vms: Vec<Vm>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vm {
    /// Its name, unique, 1 to 31 characters of `A-Za-z0-9._-`.
    pub name: String,
    /// Its image's path in the ramdisk.
    pub image: String,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// How many vCPUs it has.
    #[serde(skip_serializing_if = "is_default_vcpus")]
    pub vcpus: u32,
    /// Each vCPU's share of a CPU, beside the others'.
    #[serde(skip_serializing_if = "is_default_weight")]
    pub weight: u32,
    /// The CPUs that its vCPUs may run on; all without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// Whether it is shown split-lock detection.
    pub expose_sld: bool,
    /// Another policy than the host's.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text_if_any")]
    pub policy: Option<Policy>,
    /// Where its split locks are detected, if not as those of all others.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text_if_any")]
    pub source: Option<SldSource>,
    /// After how many ticks of the time-stamp counter it is ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_ticks: Option<u64>,
    /// Its command line.
    pub cmdline: String,
}

/// Memory in MiB of a guest of which nothing is known but its file.
const UNKNOWN_GUEST_MEMORY: u32 = 32;
/// The longest name of a VM.
const MAX_NAME: usize = 31;
/// What the hypervisor takes where the file says nothing.
const DEFAULT_VCPUS: u32 = 1;
const DEFAULT_WEIGHT: u32 = 100;

/// For values that are written as they are shown.
pub(crate) fn as_text<S: Serializer>(
    value: &impl Display,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn as_text_if_any<S: Serializer>(
    value: &Option<impl Display>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => as_text(value, serializer),
        None => serializer.serialize_none(),
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_default_vcpus(vcpus: &u32) -> bool {
    *vcpus == DEFAULT_VCPUS
}

fn is_default_weight(weight: &u32) -> bool {
    *weight == DEFAULT_WEIGHT
}

/// Where a guest's image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A test guest of this name.
    Registered(&'static str),
    /// A file.
    File(PathBuf),
}

/// A configuration with the images that it needs.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The text of `hv.toml`.
    pub config: String,
    /// Path in the ramdisk and source of every image.
    pub images: Vec<(String, Source)>,
}

impl Vm {
    /// The VM of a test guest.
    pub fn of_guest(guest: &guests::Guest) -> Self {
        Self {
            name: guest.name.to_owned(),
            image: format!("guests/{}", guest.name),
            memory_mib: guest.memory_mib,
            vcpus: guest.vcpus,
            expose_sld: guest.expose_sld,
            limit_ticks: guest.limit_ticks(),
            cmdline: guest.command_line.to_owned(),
            ..Self::default()
        }
    }
}

impl Default for Vm {
    /// One vCPU that may run everywhere and sees no detection; without name, image and memory.
    fn default() -> Self {
        Self {
            name: String::new(),
            image: String::new(),
            memory_mib: 0,
            vcpus: DEFAULT_VCPUS,
            weight: DEFAULT_WEIGHT,
            cpus: None,
            expose_sld: false,
            policy: None,
            source: None,
            limit_ticks: None,
            cmdline: String::new(),
        }
    }
}

impl HvConfig {
    /// These VMs on a machine that switches itself off at the end, as emulators should; everything else as the
    /// hypervisor has it by default.
    pub fn new(sld: Policy, vms: Vec<Vm>) -> Self {
        Self {
            sld,
            source: None,
            at_end: Some(AtEnd::PowerOff),
            slice_ticks: None,
            cpus: None,
            verify: false,
            schedule_events: false,
            migrate_exits: None,
            stop_after_loads: None,
            console: false,
            vms,
        }
    }

    /// The text of the file.
    ///
    /// # Errors
    /// If a string cannot be written as TOML.
    pub fn to_text(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }

    /// The text of the file for a person to edit: each key is explained, those that are left out too.
    ///
    /// # Errors
    /// If a string cannot be written as TOML.
    pub fn to_explained_text(&self) -> Result<String> {
        let plain = self.to_text()?;
        let mut text = String::from(HEAD);
        // Of several VMs only the first one is explained.
        let mut explained: Vec<&str> = Vec::new();
        let mut in_vm = false;
        for line in plain.lines() {
            if line == "[[vm]]" && !in_vm {
                in_vm = true;
                push_left_out(&mut text, HOST_KEYS, &explained);
                explained.clear();
                text.push_str(
                    "\n# The VMs, one [[vm]] each. They run at the same time, on all CPUs.\n",
                );
            } else if let Some((key, _)) = line.split_once(" = ") {
                let keys = if in_vm { VM_KEYS } else { HOST_KEYS };
                if let Some(known) = keys.iter().find(|known| known.name == key)
                    && !explained.contains(&key)
                {
                    explained.push(key);
                    if !in_vm {
                        text.push('\n');
                    }
                    push_comment(&mut text, known.meaning);
                }
            }
            // Blank lines come before the VMs but the first one.
            if !line.is_empty() || text.contains("[[vm]]") {
                text.push_str(line);
                text.push('\n');
            }
        }
        if in_vm {
            text.push_str("\n# What else a VM can have, between its [[vm]] and the next one:\n");
            push_left_out(&mut text, VM_KEYS, &explained);
        } else {
            push_left_out(&mut text, HOST_KEYS, &explained);
        }
        Ok(text)
    }
}

/// A key as a person is told of it.
struct Key {
    name: &'static str,
    /// A value for those that leave it out.
    example: &'static str,
    /// In lines.
    meaning: &'static [&'static str],
}

/// The first lines of the file.
const HEAD: &str = "\
# What Unsplit does on this machine. Save it, eject the stick, boot.
# Lines that start with # are not in force: take it away to set them.
";

const HOST_KEYS: &[Key] = &[
    Key {
        name: "sld",
        example: "\"warn\"",
        meaning: &[
            "What happens about a split lock that is not the guest's own affair:",
            "off: nothing. warn: the first one of a vCPU is reported, then it may.",
            "step: each is let pass and counted. emulate: each is carried out without the",
            "bus lock. ratelimit=N: so many a second for each VM, then it waits.",
            "fatal: the VM is stopped, the others go on.",
        ],
    },
    Key {
        name: "source",
        example: "\"auto\"",
        meaning: &[
            "Who detects split locks. msr: the CPU. trace: the hypervisor, which looks",
            "at each instruction; slow. auto: msr if the CPU can, else trace. none: no one.",
        ],
    },
    Key {
        name: "at_end",
        example: "\"stay\"",
        meaning: &[
            "When all VMs have ended: stay (the results stay on the screen), power-off",
            "or reboot.",
        ],
    },
    Key {
        name: "cpus",
        example: "4",
        meaning: &["How many CPUs are used at most; otherwise all, up to 64."],
    },
    Key {
        name: "slice_ticks",
        example: "1000000",
        meaning: &["How long a vCPU's turn is, in ticks of the TSC."],
    },
    Key {
        name: "verify",
        example: "true",
        meaning: &["Check all the time that the CPUs' real setting is the one that should be."],
    },
    Key {
        name: "schedule_events",
        example: "true",
        meaning: &["Write an event each time that a vCPU begins or ends its turn."],
    },
    Key {
        name: "console",
        example: "true",
        meaning: &["Take commands on the serial ports: type help there."],
    },
];

const VM_KEYS: &[Key] = &[
    Key { name: "name", example: "\"guest\"", meaning: &["1 to 31 of A-Z a-z 0-9 . _ -"] },
    Key {
        name: "image",
        example: "\"guests/guest\"",
        meaning: &["A file in the directory guests: an ELF file with a PVH entry."],
    },
    Key { name: "memory_mib", example: "32", meaning: &["Its memory, an even number of MiB."] },
    Key {
        name: "expose_sld",
        example: "true",
        meaning: &[
            "Whether the guest is shown split-lock detection and can turn it on for itself.",
        ],
    },
    Key { name: "cmdline", example: "\"\"", meaning: &["The guest's command line."] },
    Key { name: "vcpus", example: "2", meaning: &["How many virtual CPUs it has, 1 to 16."] },
    Key {
        name: "policy",
        example: "\"fatal\"",
        meaning: &["Another one than sld, for this VM; with sld fatal only emulate."],
    },
    Key { name: "source", example: "\"trace\"", meaning: &["Another one, for this VM."] },
    Key {
        name: "weight",
        example: "100",
        meaning: &["Its share of the CPUs where they are short, 1 to 1000."],
    },
    Key {
        name: "cpus",
        example: "[0, 2]",
        meaning: &["The CPUs that it may run on; 0 is the boot CPU."],
    },
    Key {
        name: "limit_ticks",
        example: "100000000000",
        meaning: &["End it after so many ticks of the TSC."],
    },
];

fn push_comment(text: &mut String, lines: &[&str]) {
    for line in lines {
        text.push_str("# ");
        text.push_str(line);
        text.push('\n');
    }
}

/// The keys that are not in use, each turned off.
fn push_left_out(text: &mut String, keys: &[Key], used: &[&str]) {
    for Key { name, example, meaning } in keys.iter().filter(|key| !used.contains(&key.name)) {
        text.push('\n');
        push_comment(text, meaning);
        text.push_str(&format!("#{name} = {example}\n"));
    }
}

impl Setup {
    /// For guests given by the name of a test guest or by a file; without any, the guests of the demonstration.
    /// `expose_sld` is for files.
    ///
    /// # Errors
    /// If a guest is neither, or its file cannot be read.
    pub fn of_guests(sld: Policy, names: &[String], expose_sld: bool) -> Result<Self> {
        Self::of_guests_by(sld, None, names, expose_sld)
    }

    /// The same where split locks are detected by `source`.
    ///
    /// # Errors
    /// As there.
    pub fn of_guests_by(
        sld: Policy,
        source: Option<SldSource>,
        names: &[String],
        expose_sld: bool,
    ) -> Result<Self> {
        let (config, images) = Self::configure(sld, names, expose_sld)?;
        let config = HvConfig { source, ..config };
        Ok(Self { config: config.to_text()?, images })
    }

    /// As [`of_guests`](Self::of_guests), for a stick that boots a real machine: the file is for a person to
    /// edit, and the results stay on the screen.
    ///
    /// # Errors
    /// As there.
    pub fn of_guests_for_people(
        sld: Policy,
        source: Option<SldSource>,
        names: &[String],
        expose_sld: bool,
    ) -> Result<Self> {
        let (config, images) = Self::configure(sld, names, expose_sld)?;
        let config = HvConfig { source, at_end: None, ..config };
        Ok(Self { config: config.to_explained_text()?, images })
    }

    /// Configuration and images for these guests.
    fn configure(
        sld: Policy,
        names: &[String],
        expose_sld: bool,
    ) -> Result<(HvConfig, Vec<(String, Source)>)> {
        let demonstration: Vec<String>;
        let names = if names.is_empty() {
            demonstration = guests::demo().map(|guest| guest.name.to_owned()).collect();
            &demonstration
        } else {
            names
        };
        let mut vms: Vec<Vm> = Vec::new();
        let mut images: Vec<(String, Source)> = Vec::new();
        for name in names {
            let (mut vm, source) = guest(name, expose_sld)?;
            match images.iter().find(|(_, known)| *known == source) {
                Some((image, _)) => vm.image.clone_from(image),
                None => {
                    let taken: Vec<&str> = images.iter().map(|(image, _)| &**image).collect();
                    vm.image = unique(&vm.image, &taken, usize::MAX);
                    images.push((vm.image.clone(), source));
                }
            }
            let taken: Vec<&str> = vms.iter().map(|vm| &*vm.name).collect();
            vm.name = unique(&vm.name, &taken, MAX_NAME);
            vms.push(vm);
        }
        Ok((HvConfig::new(sld, vms), images))
    }

    /// The same with a console on the serial ports, whatever else the configuration says.
    ///
    /// # Errors
    /// If the configuration says that there is to be none, or cannot be read.
    pub fn with_console(mut self) -> Result<Self> {
        let written: toml::Table = toml::from_str(&self.config).context("hv.toml")?;
        match written.get("console") {
            None => self.config.insert_str(0, "console = true\n"),
            Some(toml::Value::Boolean(true)) => {}
            Some(_) => bail!("the configuration has console = false: take that line away"),
        }
        Ok(self)
    }

    /// The same with an event for each load and put of a vCPU. Not for a configuration that the user
    /// wrote: that has the key or not.
    pub fn with_schedule_events(self) -> Self {
        Self { config: format!("schedule_events = true\n{}", self.config), ..self }
    }

    /// For a configuration that the user wrote. An image is a file beside it or, as `guests/NAME`, a test guest.
    ///
    /// # Errors
    /// If it cannot be read, or an image is neither.
    pub fn of_file(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Written {
            #[serde(default)]
            vm: Vec<WrittenVm>,
        }
        #[derive(Deserialize)]
        struct WrittenVm {
            image: Option<String>,
        }

        let shown = path.display();
        let config = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
        // Only what is needed here: everything else is for the hypervisor to judge.
        let written: Written = toml::from_str(&config).with_context(|| format!("{shown}"))?;
        let beside = path.parent().unwrap_or(Path::new(""));
        let mut images: Vec<(String, Source)> = Vec::new();
        for image in written.vm.into_iter().filter_map(|vm| vm.image) {
            if images.iter().any(|(known, _)| *known == image) {
                continue;
            }
            let file = beside.join(&image);
            let registered = image.strip_prefix("guests/").and_then(guests::find);
            let source = match registered {
                _ if file.is_file() => Source::File(file),
                Some(guest) => Source::Registered(guest.name),
                None => bail!(
                    "{shown}: image {image:?} is neither a file beside it nor guests/NAME with one of: {}",
                    guest_names()
                ),
            };
            images.push((image, source));
        }
        Ok(Self { config, images })
    }
}

/// VM and image of one `--guest`.
fn guest(name: &str, expose_sld: bool) -> Result<(Vm, Source)> {
    if let Some(guest) = guests::find(name) {
        return Ok((Vm::of_guest(guest), Source::Registered(guest.name)));
    }
    let path = Path::new(name);
    if !path.exists() {
        bail!("guest {name:?} is neither a file nor one of: {}", guest_names());
    }
    let length =
        fs::metadata(path).with_context(|| format!("guest {name:?} cannot be read"))?.len();
    ensure!(path.is_file(), "guest {name:?} is not a file");
    ensure!(length > 0, "guest {name:?} is an empty file");
    fs::File::open(path).with_context(|| format!("guest {name:?} cannot be read"))?;

    let stem = path.file_name().unwrap_or_default().to_string_lossy();
    let fitting = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = stem.chars().map(fitting).take(MAX_NAME).collect();
    let vm = Vm {
        image: format!("guests/{name}"),
        name,
        memory_mib: UNKNOWN_GUEST_MEMORY,
        expose_sld,
        ..Vm::default()
    };
    Ok((vm, Source::File(path.to_owned())))
}

fn guest_names() -> String {
    GUESTS.iter().map(|guest| guest.name).collect::<Vec<_>>().join(" ")
}

/// `name`, or the first of `name-2`, `name-3` … that is not taken, cut to the longest allowed length.
fn unique(name: &str, taken: &[&str], longest: usize) -> String {
    let mut candidate = name.to_owned();
    for number in 2.. {
        if !taken.contains(&&*candidate) {
            break;
        }
        let suffix = format!("-{number}");
        let keep = longest.saturating_sub(suffix.len());
        candidate = name.chars().take(keep).chain(suffix.chars()).collect();
    }
    candidate
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn images(setup: &Setup) -> Vec<&str> {
        setup.images.iter().map(|(image, _)| &**image).collect()
    }

    #[test]
    fn a_registered_guest_brings_its_own_settings() {
        let setup = Setup::of_guests(Policy::Fatal, &names(&["sld-aware"]), false).unwrap();
        let expected = "\
sld = \"fatal\"
at_end = \"power-off\"

[[vm]]
name = \"sld-aware\"
image = \"guests/sld-aware\"
memory_mib = 8
expose_sld = true
cmdline = \"\"
";
        assert_eq!(setup.config, expected);
        let source = Source::Registered("sld-aware");
        assert_eq!(setup.images, [("guests/sld-aware".to_owned(), source)]);
    }

    #[test]
    fn all_settings_are_written() {
        let vm = Vm {
            name: "a".to_owned(),
            image: "guests/a".to_owned(),
            memory_mib: 8,
            vcpus: 4,
            weight: 200,
            cpus: Some(vec![0, 2]),
            policy: Some(Policy::Fatal),
            source: Some(SldSource::Trace),
            limit_ticks: Some(7),
            ..Vm::default()
        };
        let config = HvConfig {
            source: Some(SldSource::None),
            slice_ticks: Some(20_000),
            cpus: Some(3),
            verify: true,
            schedule_events: true,
            migrate_exits: Some(300),
            stop_after_loads: Some(10_000),
            ..HvConfig::new(Policy::Warn, vec![vm])
        };
        let expected = "\
sld = \"warn\"
source = \"none\"
at_end = \"power-off\"
slice_ticks = 20000
cpus = 3
verify = true
schedule_events = true
migrate_exits = 300
stop_after_loads = 10000

[[vm]]
name = \"a\"
image = \"guests/a\"
memory_mib = 8
vcpus = 4
weight = 200
cpus = [0, 2]
expose_sld = false
policy = \"fatal\"
source = \"trace\"
limit_ticks = 7
cmdline = \"\"
";
        assert_eq!(config.to_text().unwrap(), expected);
    }

    #[test]
    fn a_file_for_people_says_the_same_and_explains_every_key() {
        let guests = names(&["sld-aware", "smp"]);
        let plain = Setup::of_guests(Policy::Warn, &guests, false).unwrap();
        let explained = Setup::of_guests_for_people(Policy::Warn, None, &guests, false).unwrap();
        assert_eq!(explained.images, plain.images);
        let mut meant: toml::Table = plain.config.parse().unwrap();
        meant.remove("at_end");
        assert_eq!(explained.config.parse::<toml::Table>().unwrap(), meant);
        assert!(!explained.config.contains("\nat_end"), "{}", explained.config);

        // Each key once with its meaning, and what is turned off is right once it is turned on.
        for key in HOST_KEYS.iter().chain(VM_KEYS) {
            let meaning = format!("# {}\n", key.meaning[0]);
            assert_eq!(explained.config.matches(&meaning).count(), 1, "{}", key.name);
        }
        let on: String = explained
            .config
            .lines()
            .map(|line| {
                line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let table: toml::Table = on.parse().unwrap();
        assert_eq!(table["at_end"].as_str(), Some("stay"));
        assert_eq!(table["cpus"].as_integer(), Some(4));
        assert_eq!(table["vm"][1]["weight"].as_integer(), Some(100));
        for line in explained.config.lines() {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn without_guests_the_demonstration_runs() {
        let setup = Setup::of_guests(Policy::Warn, &[], false).unwrap();
        let demo = guests::demo().count();
        assert_eq!(setup.images.len(), demo);
        assert!(demo > 0);
    }

    #[test]
    fn the_same_guest_twice_is_two_vms_with_one_image() {
        let twice = names(&["controls", "controls", "controls"]);
        let setup = Setup::of_guests(Policy::Warn, &twice, false).unwrap();
        assert_eq!(images(&setup), ["guests/controls"]);
        for name in ["controls", "controls-2", "controls-3"] {
            assert!(setup.config.contains(&format!("name = \"{name}\"\n")), "{}", setup.config);
        }
    }

    #[test]
    fn a_file_is_a_guest_with_a_fitting_name() {
        let directory = std::env::temp_dir().join(format!("unsplit-config-{}", std::process::id()));
        for (below, name) in [("a", "my guest (new).elf"), ("b", "my guest (new).elf")] {
            fs::create_dir_all(directory.join(below)).unwrap();
            fs::write(directory.join(below).join(name), "guest").unwrap();
        }
        let paths = ["a", "b"].map(|below| directory.join(below).join("my guest (new).elf"));
        let given: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let setup = Setup::of_guests(Policy::Warn, &given, true);
        let empty = directory.join("empty");
        fs::write(&empty, "").unwrap();
        let refused = Setup::of_guests(Policy::Warn, &[empty.display().to_string()], false);
        let folder = Setup::of_guests(Policy::Warn, &[directory.display().to_string()], false);

        let toml = directory.join("own.toml");
        fs::write(&toml, "[[vm]]\nimage = \"empty\"\n[[vm]]\nimage = \"guests/controls\"\n")
            .unwrap();
        let own = Setup::of_file(&toml);
        fs::write(&toml, "[[vm]]\nimage = \"guests/nobody\"\n").unwrap();
        let nobody = Setup::of_file(&toml);
        fs::write(&toml, "[[vm]\n").unwrap();
        let broken = Setup::of_file(&toml);
        fs::remove_dir_all(&directory).unwrap();

        let setup = setup.unwrap();
        assert_eq!(images(&setup), ["guests/my_guest__new_.elf", "guests/my_guest__new_.elf-2"]);
        assert!(setup.config.contains("name = \"my_guest__new_.elf-2\"\n"), "{}", setup.config);
        assert_eq!(setup.config.matches("expose_sld = true").count(), 2);
        assert!(refused.unwrap_err().to_string().contains("empty file"));
        assert!(folder.unwrap_err().to_string().contains("not a file"));
        let sources: Vec<Source> =
            own.unwrap().images.into_iter().map(|(_, source)| source).collect();
        assert_eq!(sources, [Source::File(empty), Source::Registered("controls")]);
        assert!(nobody.unwrap_err().to_string().contains("guests/nobody"));
        assert!(format!("{:#}", broken.unwrap_err()).contains("own.toml"));
    }

    #[test]
    fn an_unknown_guest_is_answered_with_the_names() {
        let error = Setup::of_guests(Policy::Warn, &names(&["nobody"]), false).unwrap_err();
        assert!(error.to_string().contains("\"nobody\""), "{error}");
        assert!(error.to_string().contains("split-add-cpl0"), "{error}");
    }

    #[test]
    fn names_stay_within_their_length() {
        let long = "x".repeat(MAX_NAME);
        let second = unique(&long, &[&long], MAX_NAME);
        assert_eq!((second.len(), &second[MAX_NAME - 2..]), (MAX_NAME, "-2"));
    }
}
