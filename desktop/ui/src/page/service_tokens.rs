//! The list of service tokens, and gateway configurations to copy.

use leptos::prelude::*;
use quota_common::{
    Page,
    service_token::{CreateServiceToken, ServiceToken},
};

use super::{
    create_button::{CreateButton, can_create},
    key_status::time_or,
};
use crate::{
    api,
    component::{
        Async, Card, CodeBlock, Confirm, Confirmation, DialogForm, EmptyState, Field, FormState,
        Loader, Menu, MenuItem, Modal, NewSecret, PageHeader, Pager, RelativeTime, SecretDialog,
        Shape, Toasts, copy_and_report, load, load_page, open_from_query, request_id,
    },
    model::text::{Gateway, quoted},
    session::session,
};

#[component]
pub fn ServiceTokens() -> impl IntoView {
    let loader = load_page(api::list_service_tokens);
    let creating = RwSignal::new(false);
    open_from_query(creating, can_create());
    let new = NewSecret::new();
    let form = FormState::new();
    let deletion = Deletion::new();
    view! {
        <PageHeader title="Service tokens" about="Let your gateways and middleware check requests.">
            <CreateButton open=creating label="Create token"/>
        </PageHeader>
        <Async
            loader
            what="service tokens"
            show=move |page| {
                if page.items.is_empty() {
                    return view! {
                        <EmptyState shape=Shape::Token title="No service tokens yet" about="Create a token for each gateway or service that checks requests. You get configurations for Caddy, nginx, HAProxy, Traefik and Envoy.">
                            <CreateButton open=creating label="Create your first token"/>
                        </EmptyState>
                    }
                        .into_any();
                }
                view! { <TokenTable page deletion/> }.into_any()
            }
        />
        <Card id="gateways" title="Gateway configuration">
            <Configuration token="qs_…"/>
        </Card>
        <Modal open=creating panel=true title="Create service token" locked=form.busy>
            <CreateForm open=creating form new loader/>
        </Modal>
        <NewTokenDialog new/>
        <DeleteDialog deletion loader/>
    }
}

#[component]
fn TokenTable(page: Page<ServiceToken>, deletion: Deletion) -> impl IntoView {
    let shown = page.items.len();
    let can_manage = session().can_manage();
    let rows = page
        .items
        .into_iter()
        .map(|token| {
            view! {
                <tr>
                    <th scope="row" dir="auto"><span class="clamp">{token.name.clone()}</span></th>
                    <td data-label="Token"><code>{token.prefix.clone()}"…"</code></td>
                    <td data-label="Last used">{time_or(token.last_used_at, "Never used")}</td>
                    <td data-label="Created"><RelativeTime at=token.created_at/></td>
                    <td class="row-actions">{can_manage.then(|| view! { <TokenMenu token deletion/> })}</td>
                </tr>
            }
        })
        .collect_view();
    view! {
        <table class="table">
            <caption class="visually-hidden">"Service tokens, newest first"</caption>
            <thead>
                <tr>
                    <th scope="col">"Name"</th>
                    <th scope="col">"Token"</th>
                    <th scope="col">"Last used"</th>
                    <th scope="col">"Created"</th>
                    <th scope="col"><span class="visually-hidden">"Actions"</span></th>
                </tr>
            </thead>
            <tbody>{rows}</tbody>
        </table>
        <Pager total=page.total shown next=page.next_cursor/>
    }
}

#[component]
fn TokenMenu(token: ServiceToken, deletion: Deletion) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let id = token.id;
    let label = format!("More actions for {}", token.name);
    let items = vec![
        MenuItem::run("Copy ID", move || {
            copy_and_report(id.to_string(), "Token ID", toasts);
        }),
        MenuItem::danger("Delete", move || deletion.ask(token.clone())),
    ];
    view! { <Menu label focus_key=format!("more-{id}") items/> }
}

#[derive(Clone, Copy)]
struct Deletion {
    token: RwSignal<Option<ServiceToken>>,
    confirmation: Confirmation,
}

impl Deletion {
    fn new() -> Self {
        Self {
            token: RwSignal::new(None),
            confirmation: Confirmation::new(),
        }
    }

    fn ask(self, token: ServiceToken) {
        self.token.set(Some(token));
        self.confirmation.ask();
    }
}

#[component]
fn DeleteDialog(deletion: Deletion, loader: Loader<Page<ServiceToken>>) -> impl IntoView {
    let toasts = expect_context::<Toasts>();
    let Deletion {
        token,
        confirmation,
    } = deletion;
    let run = Callback::new(move |()| {
        if let Some(it) = token.get_untracked() {
            confirmation.send(api::delete_service_token(it.id), move |()| {
                toasts.succeed(format!("Token {} deleted", quoted(&it.name)));
                loader.reload();
            });
        }
    });
    let name = move || token.get().map(|it| it.name).unwrap_or_default();
    view! {
        <Confirm
            confirmation
            title=Signal::derive(move || format!("Delete token {}?", quoted(&name())))
            message="Within a second, checks with this token will fail. Gateways that use this token with a configuration from this page will then reject all requests. This can't be undone."
            action="Delete token"
            run
        />
    }
}

/// Shows the configuration of one gateway at a time.
#[component]
fn Configuration(#[prop(into)] token: Signal<String>) -> impl IntoView {
    let selected = RwSignal::new(Gateway::Caddy);
    let files = load(api::gateway_files);
    let text = Signal::derive(move || {
        let files = files.ready().unwrap_or_default();
        selected
            .get()
            .configuration(&files, &api::origin(), &token.get())
    });
    let configuration = move || match files.error() {
        // The curl command is not in the file with the configurations, so it can be shown without the file.
        Some(error) if selected.get() != Gateway::Curl => {
            let id = error.request_id().map(str::to_owned);
            view! {
                <div class="alert" role="alert">
                    <p><strong>"Couldn't load the configurations."</strong> " " {error.message()}</p>
                    {request_id(id)}
                    <button type="button" class="button small" on:click=move |_| files.reload()>"Retry"</button>
                </div>
            }
            .into_any()
        }
        _ => view! { <CodeBlock text what="configuration"/> }.into_any(),
    };
    view! {
        <fieldset class="choice">
            <legend class="visually-hidden">"Gateway"</legend>
            {Gateway::ALL
                .into_iter()
                .map(|gateway| {
                    view! {
                        <button
                            type="button"
                            class="button small"
                            aria-pressed=move || (selected.get() == gateway).to_string()
                            on:click=move |_| selected.set(gateway)
                        >
                            {gateway.name()}
                        </button>
                    }
                })
                .collect_view()}
        </fieldset>
        {configuration}
    }
}

#[component]
fn CreateForm(
    open: RwSignal<bool>,
    form: FormState,
    new: NewSecret,
    loader: Loader<Page<ServiceToken>>,
) -> impl IntoView {
    form.reset();
    let name = RwSignal::new(String::new());
    let submit = move || {
        let body = CreateServiceToken {
            name: name.get_untracked().into(),
        };
        form.send(api::create_service_token(body), move |token| {
            let _ = open.try_set(false);
            new.show(token.service_token.name, token.token);
            loader.reload();
        });
    };
    view! {
        <DialogForm form open action="Create token" locked=true submit>
            <Field form name="name" id="token_name" label="Name" value=name required=true hint="What uses this token, such as a gateway"/>
        </DialogForm>
    }
}

#[component]
fn NewTokenDialog(new: NewSecret) -> impl IntoView {
    view! {
        <SecretDialog
            new
            title=Signal::derive(move || format!("Save your token for {}", quoted(&new.name.get())))
            noun="token"
            recovery="If you lose it, create a new one."
        >
            <h3>"Gateway configuration"</h3>
            <Configuration token=new.secret/>
        </SecretDialog>
    }
}
