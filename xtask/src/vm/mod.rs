//! `cargo xtask vm-test` and `vm-run`: the kernel suites, or any program, in a VM whose kernel has VFIO
//! devices that migrate. How it works and how long it takes: `tests/vm/README.md`.
//!
//! Nothing here knows what the tests check.

mod bench;
mod boot;
mod build;
mod image;
mod rundir;
mod verdict;

pub(crate) use bench::{inside as bench_inside, run as bench};

use crate::{Checked, Findings};
use boot::{Boot, End, Ran, Wish};
use build::{KERNELS, Kernel, SUITES};
use rundir::RunDir;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(300);
const MEMORY_MIB: u32 = 1024;
const CPUS: u32 = 2;

/// What stands after `vm-test` or `vm-run`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    kernels: Vec<String>,
    filter: Option<String>,
    deadline: Option<Duration>,
    keep: bool,
    root_image: bool,
    words: Vec<String>,
    /// A program of this machine with its arguments.
    program: Vec<String>,
}

impl Options {
    /// Reads the options in `known`, and with `program` what stands after them.
    fn read(args: &[&str], known: &[&str], program: bool) -> Result<Self, String> {
        let mut options = Self::default();
        let mut args = args.iter().copied();
        while let Some(name) = args.next() {
            if program && !name.starts_with('-') {
                options.program = std::iter::once(name).chain(args.by_ref()).map(str::to_owned).collect();
                break;
            }
            if !known.contains(&name) {
                return Err(format!("{name}: known are {}", known.join(", ")));
            }
            let mut value = || args.next().ok_or_else(|| format!("{name} needs a value"));
            match name {
                "--kernel" => options.kernels.push(value()?.to_owned()),
                "--filter" => options.filter = Some(value()?.to_owned()),
                "--deadline" => {
                    let text = value()?;
                    let seconds = text.parse().ok().filter(|s| (1..=86_400).contains(s));
                    let seconds = seconds.ok_or_else(|| format!("--deadline {text}: 1 to 86400 seconds"))?;
                    options.deadline = Some(Duration::from_secs(seconds));
                }
                "--option" => options.words.push(value()?.to_owned()),
                "--keep" => options.keep = true,
                _ => options.root_image = true,
            }
        }
        Ok(options)
    }

    fn boot(&self, kernel: &Kernel, image: image::Image, wish: Wish) -> Boot {
        Boot {
            kernel: kernel.image.clone(),
            memory_mib: MEMORY_MIB,
            cpus: CPUS,
            image,
            iommu: true,
            root_image: None,
            options: self.words.clone(),
            deadline: self.deadline.unwrap_or(DEADLINE),
            wish,
        }
    }
}

/// `vm-test`: all suites on all kernels.
pub(crate) fn test(root: &Path, args: &[&str]) -> Checked {
    let mut findings = Findings::default();
    let options = Options::read(args, &["--kernel", "--filter", "--deadline", "--option", "--keep"], false)?;
    match std::env::var("AIRLIFT_VM").as_deref() {
        Ok("skip") => {
            findings.say(
                "AIRLIFT_VM=skip: the kernel suite was left out. This is no pass: nothing has been tried on a real kernel.",
            );
            return Ok(findings);
        }
        Err(std::env::VarError::NotPresent) | Ok("") => {}
        Ok("inside") => return Err("this is the test VM already (AIRLIFT_VM=inside)".into()),
        Ok(other) => return Err(format!("AIRLIFT_VM={other}: only skip is known")),
        Err(e) => return Err(format!("AIRLIFT_VM: {e}")),
    }
    let cache = rundir::cache()?;
    // First what fails quickly.
    let programs = build::programs(root)?;
    let versions = match &options.kernels[..] {
        [] => KERNELS.map(str::to_owned).to_vec(),
        given => given.to_vec(),
    };
    let kernels = versions.iter().map(|v| build::kernel(root, &cache, v)).collect::<Result<Vec<_>, _>>()?;
    let passes = passes(options.filter.as_deref());
    // Side by side: a VM waits much of its time, and has two processors at most.
    let results: Vec<Checked> = std::thread::scope(|scope| {
        let running: Vec<_> = kernels
            .iter()
            .map(|kernel| {
                let (options, programs, passes, cache) = (&options, &programs, &passes, &cache);
                scope.spawn(move || {
                    let mut image = build::base(root, kernel)?;
                    programs.add_to(&mut image)?;
                    on_one_kernel(cache, kernel, options, &image, passes)
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Checked>| {
            thread.join().unwrap_or_else(|_| Err("a thread has panicked".into()))
        };
        running.into_iter().map(join).collect()
    });
    for result in results {
        let Findings { lines, wrong } = result?;
        findings.lines.extend(lines);
        findings.wrong.extend(wrong);
    }
    Ok(findings)
}

/// Runs all `passes` on one kernel.
fn on_one_kernel(
    cache: &Path,
    kernel: &Kernel,
    options: &Options,
    image: &image::Image,
    passes: &[Pass],
) -> Checked {
    let mut findings = Findings::default();
    for pass in passes {
        let mut boot =
            options.boot(kernel, image.clone(), Wish::Script(suites_script(&pass.suites, &pass.which)));
        boot.iommu = pass.iommu;
        let begun = Instant::now();
        let ran = run(cache, kernel, &boot, options.keep, true)?;
        let verdict = verdict::judge(&ran, &pass.suites, pass.partial);
        let seconds = begun.elapsed().as_secs();
        let name = format!("kernel {}{}", kernel.version, if pass.iommu { "" } else { " without an IOMMU" });
        findings.lines.extend(verdict.lines.into_iter().map(|line| format!("{name}: {line}")));
        if verdict.wrong.is_empty() {
            findings.say(format!("{name}: no complaint of the kernel; the VM took {seconds} s"));
        } else {
            show(cache, kernel, &ran);
        }
        findings.wrong.extend(verdict.wrong.into_iter().map(|line| format!("{name}: {line}")));
    }
    Ok(findings)
}

/// What the names of tests contain that need a VM without an IOMMU: up to 6.12 the kernel gives its mock
/// devices to the first IOMMU that it has.
const NO_IOMMU: &str = "mock_iommu";

/// One VM of `vm-test`.
struct Pass {
    iommu: bool,
    suites: Vec<&'static str>,
    /// Which tests, as the suites' options.
    which: String,
    /// A suite may have none of them, but not all suites.
    partial: bool,
}

/// The VMs in which all tests run that `filter` fits.
fn passes(filter: Option<&str>) -> Vec<Pass> {
    let all: Vec<_> = SUITES.iter().map(|suite| suite.name).collect();
    let which =
        format!(" --skip {NO_IOMMU}{}", filter.map(|f| format!(" -- {}", quoted(f))).unwrap_or_default());
    let with = Pass { iommu: true, suites: all.clone(), which, partial: filter.is_some() };
    let without = Pass { iommu: false, suites: all, which: format!(" -- {NO_IOMMU}"), partial: true };
    match filter {
        None => vec![with, without],
        Some(filter) if filter.contains(NO_IOMMU) => {
            vec![Pass { which: format!(" -- {}", quoted(filter)), ..without }]
        }
        Some(_) => vec![with],
    }
}

/// `vm-run`: one program in the VM, or a shell beside the suites and the command.
pub(crate) fn run_program(root: &Path, args: &[&str]) -> Checked {
    let known = ["--kernel", "--deadline", "--option", "--keep", "--root-image"];
    let options = Options::read(args, &known, true)?;
    let cache = rundir::cache()?;
    let version = match &options.kernels[..] {
        [] => KERNELS[0],
        [one] => one,
        _ => return Err("vm-run takes one --kernel".into()),
    };
    let programs = if options.program.is_empty() { Some(build::programs(root)?) } else { None };
    let kernel = build::kernel(root, &cache, version)?;
    let mut image = build::base(root, &kernel)?;
    let wish = match &options.program[..] {
        [] => Wish::Shell,
        [program, args @ ..] => {
            image.program(Path::new(program), "/vm/bin/program")?;
            let folder = if options.root_image { "/mnt/bin" } else { "/vm/bin" };
            let args: String = args.iter().map(|arg| format!(" {}", quoted(arg))).collect();
            Wish::Script(format!("exec {folder}/program{args}\n"))
        }
    };
    if let Some(programs) = programs {
        programs.add_to(&mut image)?;
    }
    let mut boot = options.boot(&kernel, image, wish);
    if options.root_image {
        boot.root_image = Some(build::root_image(root, &cache)?);
    }
    let ran = run(&cache, &kernel, &boot, options.keep, false)?;
    let mut findings = Findings::default();
    if boot.wish == Wish::Shell {
        return Ok(findings);
    }
    match &ran.end {
        End::Code(0) => {}
        End::Code(code) => findings.wrong(format!("exit code {code}")),
        End::NotReady(reason) => findings.wrong(format!("the VM was not made ready: {reason}")),
        End::Died(how) => findings.wrong(format!("the VM died without an exit code: {how}")),
        End::Deadline(limit) => findings.wrong(format!("no end after {} s", limit.as_secs())),
    }
    findings.wrong.extend(verdict::complaints(&ran));
    if !findings.wrong.is_empty() {
        show(&cache, &kernel, &ran);
    }
    Ok(findings)
}

/// Runs the VM, prints what its programs print, and keeps the logs in the cache.
fn run(cache: &Path, kernel: &Kernel, boot: &Boot, keep: bool, version: bool) -> Result<Ran, String> {
    let dir = RunDir::new(cache, keep)?;
    let ran = boot.run(&dir, |line| {
        if version {
            println!("{} | {line}", kernel.version);
        } else {
            println!("{line}");
        }
    })?;
    let logs = cache.join("log");
    let write = |name: String, text: &str| {
        let path = logs.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    fs::create_dir_all(&logs).map_err(|e| format!("{}: {e}", logs.display()))?;
    write(format!("{}-console.log", kernel.version), &ran.console)?;
    write(format!("{}-output.log", kernel.version), &ran.output)?;
    Ok(ran)
}

/// Shows the end of the kernel's console, and where the rest is.
fn show(cache: &Path, kernel: &Kernel, ran: &Ran) {
    println!("{} | the end of the kernel's console:", kernel.version);
    for line in verdict::tail(&ran.console) {
        println!("{} > {line}", kernel.version);
    }
    println!("all of it: {}", cache.join("log").join(format!("{}-console.log", kernel.version)).display());
}

/// Runs every suite, also after one has failed, and says where each begins and how it ended.
fn suites_script(suites: &[&str], which: &str) -> String {
    let mut script = "all=0\n".to_owned();
    for suite in suites {
        script.push_str(&format!(
            "echo '{}{suite}'\n/vm/bin/{suite} --ignored --test-threads=1{which}\ncode=$?\n\
             echo; echo \"{}$code\"\n[ $code = 0 ] || all=1\n",
            verdict::SUITE,
            verdict::CODE
        ));
    }
    script.push_str("exit $all\n");
    script
}

/// A word for `sh`, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_unknown_ones_are_refused() {
        let known = ["--kernel", "--filter", "--keep"];
        let options =
            Options::read(&["--kernel", "6.12", "--kernel", "7.3", "--filter", "mtty"], &known, false)
                .unwrap();
        assert_eq!(options.kernels, ["6.12", "7.3"]);
        assert_eq!(options.filter.as_deref(), Some("mtty"));
        assert!(Options::read(&["--kernels"], &known, false).unwrap_err().contains("--kernel, --filter"));
        assert!(Options::read(&["--kernel"], &known, false).unwrap_err().contains("needs a value"));
        // A program is no option, and what stands after it is its own.
        assert!(Options::read(&["prog"], &known, false).is_err());
        let options = Options::read(&["--keep", "prog", "--kernel"], &known, true).unwrap();
        assert_eq!(options.program, ["prog", "--kernel"]);
    }

    #[test]
    fn the_script_runs_all_suites_and_fails_if_one_has() {
        let folder = std::env::temp_dir().join(format!("airlift-suites-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("a"), "printf 'half a line'; exit 3").unwrap();
        fs::write(folder.join("b"), "echo \"b $*\"").unwrap();
        let script = suites_script(&["a", "b"], &format!(" -- {}", quoted("it's")))
            .replace("/vm/bin/", &format!("sh {}/", folder.to_str().unwrap()));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "VM: suite a\nhalf a line\nVM: exit code 3\nVM: suite b\nb --ignored --test-threads=1 -- it's\n\nVM: exit code 0\n"
        );
        assert_eq!(output.status.code(), Some(1));
    }
}
